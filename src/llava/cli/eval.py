"""`llava eval MODEL --tasks ... --data ROOT --out DIR`: the family's benchmarks; and score, compare, demo, list.

A first word that is none of the commands is the model of `llava eval run`, so that the usual call has no extra word.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from llava.cli.opening import (
    BaseOption,
    DeviceOption,
    DtypeOption,
    LoadInOption,
    Opening,
    TemplateOption,
    TowerOption,
)
from llava.errors import LlavaError, UsageError

if TYPE_CHECKING:
    from llava.eval.run import Asking, Judging
    from llava.eval.runner import Answerer
    from llava.eval.task import Question, Task


class _Group(TyperGroup):
    """`run` is the command where none is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    help="Measure a model with the family's benchmarks. `llava eval MODEL --tasks pope,gqa --data ROOT --out DIR` is "
    "`llava eval run`, whose options `llava eval run --help` lists.",
)

DataOption = Annotated[
    Path | None, typer.Option("--data", help="The folder with the benchmarks' own files; see --describe.")
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Score by the repaired rule where the official has a bug.")
]
SplitOption = Annotated[str | None, typer.Option("--split", help="The benchmark's usual one when not given.")]
JudgeOption = Annotated[
    str | None,
    typer.Option("--judge", help='Address of the judge for benchmarks that need one, or "openai"; its key is in '
                 "OPENAI_API_KEY."),
]  # fmt: skip
JudgeModelOption = Annotated[
    str | None, typer.Option("--judge-model", help="Another judge than the published one; figures then do not compare.")
]


@app.command()
def run(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub id; without it the newest quickstart model.", show_default=False)
    ] = None,
    tasks: Annotated[str, typer.Option("--tasks", help="Benchmarks, with commas; `llava eval list` names them.")] = "",
    data: DataOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for answers and report; run again to go on.")
    ] = None,
    describe: Annotated[
        str | None, typer.Option("--describe", metavar="TASK", help="Say which files a benchmark needs, and leave.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", metavar="URL", help="Ask an OpenAI-compatible server instead.")
    ] = None,
    endpoint_model: Annotated[
        str | None, typer.Option("--endpoint-model", help="The server's model, where it has several.")
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests at once, with --endpoint.")] = 16,
    split: SplitOption = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first so many questions, to try.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option("--shard", metavar="K/N", help="Part K of N, from 0; the run without it merges them.")
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="No beams where a benchmark is published with them.")
    ] = False,
    strict: StrictOption = False,
    skip_errors: Annotated[
        bool, typer.Option("--skip-errors", help="Leave out questions that cannot be asked; the report counts them.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Ask everything anew.")] = False,
    judge: JudgeOption = None,
    judge_model: JudgeModelOption = None,
    base: BaseOption = None,
    vision_tower: TowerOption = None,
    template: TemplateOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    load_in: LoadInOption = None,
) -> None:
    """Ask a model a benchmark's questions, score its answers by the official rule and write a report."""
    from llava.eval.run import Asking, read_questions
    from llava.eval.runner import Shard
    from llava.eval.tasks import open_task

    if describe is not None:
        from llava.cli.eval_texts import description

        typer.echo(description(open_task(describe)))
        return
    chosen = [open_task(name) for name in _names(tasks)]
    if data is None or out is None:
        raise UsageError("say where the benchmarks are with --data and where answers go with --out")
    if endpoint is not None and model is not None:
        raise UsageError(f"{model} and --endpoint {endpoint}: one of both; --endpoint-model names a server's model")
    asking = Asking(
        split=split,
        shard=Shard() if shard is None else Shard.parse(shard),
        limit=limit,
        greedy=greedy,
        strict=strict,
        force=force,
        skip_errors=skip_errors,
    )
    judging = _judging(judge, judge_model)
    questions = {task.name: read_questions(task, data, asking) for task in chosen}  # wrong files are said at once
    if endpoint is not None:
        from llava.eval.endpoint import ChatEndpoint, EndpointModel

        with ChatEndpoint(endpoint, model=endpoint_model) as there:
            answerer = EndpointModel(there, concurrency=concurrency)
            run_tasks(chosen, answerer, data=data, out=out, asking=asking, judging=judging, questions=questions)
        return
    from llava.eval.runner import LocalModel

    opening = Opening(
        model, base=base, vision_tower=vision_tower, template=template, device=device, dtype=dtype, load_in=load_in
    ).found()
    local = LocalModel(opening.open(), name=_name_of(str(opening.path)))
    run_tasks(chosen, local, data=data, out=out, asking=asking, judging=judging, questions=questions)


def run_tasks(
    tasks: list[Task],
    answerer: Answerer,
    *,
    data: Path,
    out: Path,
    asking: Asking,
    judging: Judging,
    questions: dict[str, list[Question]],
) -> None:
    """Run benchmarks one after the other and write the report; one that fails does not stop the next."""
    from llava.cli.eval_texts import Bar, summary
    from llava.eval.report import write_report
    from llava.eval.run import run_task

    results = []
    failed: list[str] = []
    with Bar() as bar:
        for task in tasks:
            try:
                result = run_task(
                    task,
                    answerer,
                    root=data,
                    out=out,
                    asking=asking,
                    questions=questions[task.name],
                    judging=judging,
                    progress=bar,
                )
            except LlavaError as error:
                if len(tasks) == 1:
                    raise
                failed.append(f"{task.name}: {error}")
                print(f"llava eval: {failed[-1]}", file=sys.stderr)
                continue
            if result is not None:
                results.append(result)
    if results:
        typer.echo(summary(results))
        typer.echo(f"report: {write_report(out)[-1]}")
    elif not failed:
        typer.echo(f"answers of this shard are in {out}; run without --shard to merge and score")
    if failed:
        raise UsageError(f"{len(failed)} of {len(tasks)} benchmarks have no figures: {'; '.join(failed)}")


@app.command()
def score(
    task: Annotated[str, typer.Argument(help="The benchmark.")],
    answers: Annotated[
        Path, typer.Option("--answers", help="JSONL of the original's format (or a folder of shards), from any system.")
    ],
    data: Annotated[Path, typer.Option("--data", help="The folder with the benchmark's own files.")],
    strict: StrictOption = False,
    split: SplitOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write result, upload and report there.")] = None,
    judge: JudgeOption = None,
    judge_model: JudgeModelOption = None,
) -> None:
    """Score answers that are there already, whoever made them; no model is opened."""
    from llava.eval.answers import read_answers
    from llava.eval.judge import JudgedTask
    from llava.eval.report import write_report
    from llava.eval.run import score_answers
    from llava.eval.tasks import open_task

    chosen = open_task(task)
    judging = _judging(judge, judge_model)
    questions = chosen.read(data, split=split)
    rows = read_answers(answers)
    folder = None if out is None else out / chosen.name
    if isinstance(chosen, JudgedTask):
        rows = judging.judge(chosen, questions, rows, folder or answers.parent)
    made_by = {"answers": str(answers), "split": split, "model": _models(rows)}
    result = score_answers(chosen, questions, rows, root=data, folder=folder, strict=strict, made_by=made_by)
    typer.echo(result.printed)
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    if out is not None:
        typer.echo(f"report: {write_report(out)[-1]}")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="The --out folder of one run.")],
    second: Annotated[Path, typer.Argument(help="The --out folder of the other.")],
    out: Annotated[Path, typer.Option("--out", help="Where the page goes.")] = Path("llava-comparison"),
) -> None:
    """Show which answers changed between two models, and whether the difference is more than chance."""
    from llava.cli.eval_texts import comparison_lines
    from llava.eval.compare import write_comparison

    comparisons = write_comparison(first, second, out)
    typer.echo(comparison_lines(comparisons))
    typer.echo(f"page: {out / 'comparison.html'}")


@app.command("list")
def list_tasks() -> None:
    """Name the benchmarks."""
    from llava.eval.tasks import TASKS, open_task

    width = max(map(len, TASKS), default=0)
    for name in TASKS:
        facts = open_task(name).describe()
        needs = f" (needs {', '.join(facts.needs)})" if facts.needs else ""
        typer.echo(f"{name:<{width}}  {facts.title}{needs}")
    typer.echo("\nNext: llava eval --describe NAME")


def _name_of(path: str) -> str:
    """The folder's name; that of the run where the folder is a run's `model`."""
    folder = Path(path).expanduser().absolute()
    return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name


def _names(tasks: str) -> list[str]:
    from llava.eval.tasks import TASKS

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UsageError("say which benchmarks with --tasks; `llava eval list` names them")
    return list(dict.fromkeys(TASKS if names == ["all"] else names))


def _judging(judge: str | None, model: str | None) -> Judging:
    from llava.eval.judge import OPENAI_URL, Judge
    from llava.eval.run import Judging

    if judge is None:
        return Judging()
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)  # noqa: E731
    return Judging(Judge(OPENAI_URL if judge == "openai" else judge, model=model), say)


def _models(rows: Any) -> str | None:
    names = dict.fromkeys(str(row.meta["model_id"]) for row in rows if row.meta.get("model_id"))
    return ", ".join(names) or None


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Argument(help="A model of `llava quickstart`; the newest when not given.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Where files, answers and report go.")] = Path("llava-eval-demo"),
    scenes: Annotated[int, typer.Option("--scenes", min=2, help="How many held-out pictures.")] = 60,
    force: Annotated[bool, typer.Option("--force", help="Ask everything anew.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """The whole path in a minute: the quickstart's drawn scenes as five benchmarks, scored by their rules."""
    from llava.eval.demo import demo_tasks, write_demo
    from llava.eval.run import Asking, Judging, read_questions
    from llava.eval.runner import LocalModel

    opening = Opening(model, device=device, dtype=dtype).found()
    data = write_demo(out / "data", num_scenes=scenes)
    tasks, asking = demo_tasks(), Asking(force=force)
    questions = {task.name: read_questions(task, data, asking) for task in tasks}
    local = LocalModel(opening.open(), name=_name_of(str(opening.path)))
    run_tasks(tasks, local, data=data, out=out, asking=asking, judging=Judging(), questions=questions)
