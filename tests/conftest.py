"""What many tests start from: a small toy world and the folders of its stages, made once for each process of tests."""
import os
import shutil
from pathlib import Path

import pytest
from scripts import TOKENIZER, run

if not os.environ.get("LIBRA_GPU"):                       # `make test-gpu` sets it; all other tests are for a CPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy")
    run("toy.make", "--out", path, "--captions 60 --chats 40 --questions 69 --llama-steps 3 --clip-steps 3")
    return path


@pytest.fixture(scope="session")
def tokenizer(toy):
    run("train_tokenizer.py", "--clip", toy / "clip", "--data", toy / "captions/*.tar", "--out",
        toy / "tokenizer", TOKENIZER, "--steps 7 --disc-start 2 --save-every 3 --keep 3 --sample-every 2")
    return toy / "tokenizer"


@pytest.fixture(scope="session")
def pretrain(toy, tokenizer):
    """-> the options of a small pretraining run"""
    return ["--llm", toy / "llama", "--image-tokenizer", tokenizer, "--data", toy / "captions/*.tar", "--images",
            toy / "chats/images", "--steps 7 --save-every 3 --keep 3 --warmup 2 --batch 6 --lr 1e-3",
            "--text-to-image 0.4"]


@pytest.fixture(scope="session")
def base(toy, pretrain):
    run("pretrain.py", *pretrain, "--out", toy / "pretrain")
    return toy / "pretrain"


@pytest.fixture(scope="session")
def tuned(toy, base):
    run("sft.py", "--model", base, "--data", toy / "chats/chat.json", "--images", toy / "chats/images", "--out",
        toy / "sft", "--steps 3 --warmup 1 --batch 6 --lr 1e-3")
    return toy / "sft"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder of ours"""
    import tiny  # not above: no import may look for a GPU before CUDA_VISIBLE_DEVICES is set
    path = tmp_path_factory.mktemp("model")
    tiny.whole(path).save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))
