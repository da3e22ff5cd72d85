"""Reloads an exported folder in a clean process, without dynaconv, and compares what it computes.

Three loads must agree: stock transformers and ``trust_remote_code=True`` over there, ``dynaconv.load`` over here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dynaconv.dynamic.modeling import load
from dynaconv.errors import ExportError

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
PROMPT_TOKENS = 24

_SCRIPT = """
import json, sys

class NoDynaconv:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dynaconv":
            raise ModuleNotFoundError("dynaconv is not to be imported here", name=name)

sys.meta_path.insert(0, NoDynaconv())
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

folder, out, dial = sys.argv[1], sys.argv[2], float(sys.argv[3])
ids = torch.tensor([json.loads(sys.argv[4])])
stock, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
remote = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=True)
with torch.no_grad():
    logits = {
        "stock": stock.eval()(ids).logits,
        "remote_full": remote.eval()(ids, dial=1.0).logits,
        "remote_dial": remote(ids, dial=dial).logits,
    }
save_file({name: value.contiguous() for name, value in logits.items()}, out)
print(json.dumps({name: sorted(map(str, found)) for name, found in info.items() if isinstance(found, (set, list))}))
"""


def check(folder: Path, dial: float) -> dict[str, float]:
    """Compares the three loads on one prompt.

    Args:
        folder: Exported folder.
        dial: A calibrated budget below 1.

    Returns:
        Largest differences relative to the largest logit, by what was compared.

    Raises:
        ExportError: The folder does not load, tensors are missing or unexpected, or logits differ.
    """
    model = load(folder).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT_TOKENS), generator=generator)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits.safetensors"
        found = _clean_process(folder, out, dial, ids[0].tolist(), Path(scratch))
        there = load_file(out)
    wrong = {name: keys for name, keys in found.items() if keys}
    if wrong:
        raise ExportError("stock transformers does not load the folder cleanly", where=folder, found=wrong)
    with torch.no_grad():
        here_full, here_dial = model(ids, dial=1.0).logits, model(ids, dial=dial).logits
    differences = {
        "stock against full dial": _difference(there["stock"], here_full),
        "trust_remote_code against dynaconv.load, full dial": _difference(there["remote_full"], here_full),
        f"trust_remote_code against dynaconv.load, dial {dial:g}": _difference(there["remote_dial"], here_dial),
    }
    allowed = TOLERANCE[model.dtype]
    for name, difference in differences.items():
        if not difference <= allowed:
            raise ExportError(
                f"the exported model computes something else: {name}",
                where=folder,
                expected=f"at most {allowed:g} relative",
                found=f"{difference:.2e}",
                hint="this is a defect of dynaconv or of the installed transformers: please report both versions",
            )
    return differences


def _clean_process(folder: Path, out: Path, dial: float, ids: list[int], scratch: Path) -> dict[str, list[str]]:
    quiet = {
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, "-P", "-W", "ignore", "-c", _SCRIPT, str(folder.absolute()), str(out), str(dial)]
    done = subprocess.run(
        [*command, json.dumps(ids)], env={**os.environ, **quiet}, capture_output=True, text=True, cwd=scratch
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExportError("the exported folder does not load in a clean process", where=folder, found=last)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-30))
