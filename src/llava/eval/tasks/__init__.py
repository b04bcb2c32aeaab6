"""The benchmarks that ship, by name; `open_task` also takes one from outside as "package.module:NAME"."""

from __future__ import annotations

from importlib import import_module

from llava.errors import UsageError, name_nearest
from llava.eval.task import Task

TASKS: dict[str, str] = {
    "refcoco": "llava.eval.tasks.refcoco:REFCOCO",
    "refcoco+": "llava.eval.tasks.refcoco:REFCOCO_PLUS",
    "refcocog": "llava.eval.tasks.refcoco:REFCOCOG",
    "coco_caption": "llava.eval.tasks.coco_caption:COCOCaption",
    "pope": "llava.eval.tasks.pope:POPE",
    "textvqa": "llava.eval.tasks.textvqa:TextVQA",
    "mmbench": "llava.eval.tasks.mmbench:MMBENCH",
    "mmbench_cn": "llava.eval.tasks.mmbench:MMBENCH_CN",
    "ccbench": "llava.eval.tasks.mmbench:CCBENCH",
    "seed": "llava.eval.tasks.seed:SEED",
    "gqa": "llava.eval.tasks.gqa:GQA",
    "mme": "llava.eval.tasks.mme:MME",
    "llava_bench": "llava.eval.tasks.llava_bench:LLAVA_BENCH",
    "llava_bench_coco": "llava.eval.tasks.llava_bench:LLAVA_BENCH_COCO",
    "vqav2": "llava.eval.tasks.vqav2:VQAV2",
    "vizwiz": "llava.eval.tasks.vizwiz:VizWiz",
    "mmvet": "llava.eval.tasks.mmvet:MMVet",
    "scienceqa": "llava.eval.tasks.scienceqa:ScienceQA",
    "qbench": "llava.eval.tasks.qbench:QBench",
    "mmmu": "llava.eval.tasks.mmmu:MMMU",
    "mathvista": "llava.eval.tasks.mathvista:MathVista",
    "hallusionbench": "llava.eval.tasks.hallusionbench:HallusionBench",
}


def open_task(name: str) -> Task:
    """The task of a name or of "package.module:NAME". Raises UsageError, naming the nearest, for an unknown one."""
    target = TASKS.get(name, name)
    module, colon, attribute = target.partition(":")
    if not colon:
        raise UsageError(f"no task {name!r}; {name_nearest(name, TASKS)}, or package.module:NAME of your own")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"task {name!r}: {error}; give package.module:NAME that Python can import") from None
    task = found() if isinstance(found, type) else found
    if not isinstance(task, Task):
        raise UsageError(f"task {name!r}: {attribute} has not the methods of llava.eval.task.Task")
    return task
