"""Load for the forkserver what its children would each load themselves, then freeze it all.

A child's garbage collector does not visit frozen objects; otherwise it visits every module of
torch several times in each run.
"""

import gc
from importlib import import_module
from importlib.util import find_spec

from PIL import Image

MODULES = [
    "torch.distributed.fsdp",
    "cmtmae_scale.backends.fsdp",
    "cmtmae_scale.commands.evaluate",
    "cmtmae_scale.commands.finetune",
    "cmtmae_scale.commands.pretrain",
    "cmtmae_scale.engine.build",
    "cmtmae_scale.engine.loop",
    "cmtmae_scale.engine.run",
    "cmtmae_scale.evaluation.frozen",
    "cmtmae_scale.evaluation.periodic",
    "cmtmae_scale.finetuning.task",
    "cmtmae_scale.pretraining.build",
    "cmtmae_scale.pretraining.task",
    "cmtmae_scale.tools.estimate",
    "cmtmae_scale.tools.figures.during",
    "tests.engine.fault_case",
    "tests.finetuning.finetune_case",
]
if find_spec("deepspeed") is not None:
    MODULES += ["cmtmae_scale.backends.deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"]
if find_spec("nvidia") is not None and find_spec("nvidia.nvimgcodec") is not None:
    MODULES += ["nvidia.nvimgcodec"]

for name in MODULES:
    import_module(name)
Image.init()
gc.collect()
gc.freeze()
