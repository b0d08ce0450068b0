"""Is the installed wheel the one that was asked for? ``check_wheel.py SITE CUOBJDUMP ARCHITECTURE...``"""

import re
import subprocess
import sys

import torch

import logquant
from logquant import _C, machine, ops
from logquant.ops import reference

site, cuobjdump, *architectures = sys.argv[1:]
assert logquant.__file__.startswith(site), logquant.__file__
assert _C.torch_version == "2.13.0", f"built with torch {_C.torch_version}: it was not pinned"
assert _C.cuda_architectures == architectures, _C.cuda_architectures
for name in ("quantize", "dequantize", "evict_", "attend"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"logquant::{name}", "CUDA"), name
for kind, names in (("elf", architectures), ("ptx", [name for name in architectures if name.endswith("+PTX")])):
    command = [cuobjdump, f"--list-{kind}", _C.__file__]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = set(re.findall(r"\.sm_(\d+)\.", listed))
    assert found == {name.removesuffix("+PTX").replace(".", "") for name in names}, (kind, found)
k = torch.randn(1, 1, 64, 64)
fmt = logquant.PageFormat(64)
assert torch.equal(ops.quantize(k, k, fmt), reference.quantize(k, k, fmt))
facts = machine.describe()
print("imported:", facts["instruction_set"], facts["cuda_architectures"], facts["cuda_device"])
