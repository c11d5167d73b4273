"""Damaged inputs of every reader: only the errors that are declared, in seconds, without eating the memory.

    make fuzz                   # 20,000 cases; here a share of them:  python tests/test_fuzz.py COUNT [NAME...]

fuzz_data.py, fuzz_eval.py, fuzz_weights.py and fuzz_checkpoints.py have the cases: CASES = {reader: function(rng,
folder)}, which makes one damaged input and reads it. A UserError or a BadSample is what a reader may raise.
"""
import importlib
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.weights import UserError
from data import BadSample

MODULES = [path.stem for path in Path(__file__).parent.glob("fuzz_*.py")]
CASES = {f"{module[5:]}: {name}": function for module in sorted(MODULES)
         for name, function in importlib.import_module(module).CASES.items()}
SECONDS, BYTES = 10, 2e9


def too_slow(*_):
    raise TimeoutError(f"longer than {SECONDS} s")


def failures(name, count, seed=0):
    """-> [(number of the case, traceback)]"""
    failed = []
    signal.signal(signal.SIGALRM, too_slow)
    for number in range(count):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        with tempfile.TemporaryDirectory() as folder:
            signal.alarm(SECONDS)
            try:
                CASES[name](np.random.default_rng([seed, number]), Path(folder))
            except (UserError, BadSample):
                pass
            except Exception:  # noqa: BLE001             # the very thing that is looked for
                failed.append((number, traceback.format_exc()))
            finally:
                signal.alarm(0)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        if grown > BYTES:
            failed.append((number, f"{grown / 1e9:.1f} GB of memory"))
    return failed


@pytest.mark.parametrize("name", CASES)
def test_damaged_inputs(name):
    assert not failures(name, 20)


def main(count=20_000, *names):
    chosen, total, began = [name for name in CASES if not names or any(part in name for part in names)], 0, time.time()
    for name in chosen:
        failed = failures(name, int(count) // len(chosen))
        total += len(failed)
        print(f"{name}: {int(count) // len(chosen)} cases, {len(failed)} undeclared", flush=True)
        for number, reason in failed[:3]:
            print(f"  case {number}: {reason}")
    print(f"{len(chosen)} readers, {total} undeclared, {time.time() - began:.0f} s")
    return total > 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
