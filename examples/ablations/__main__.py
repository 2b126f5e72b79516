"""MM1's ablations in small.

    python -m examples.ablations list
    python -m examples.ablations run connectors --out runs/ablations
    python -m examples.ablations run all --out runs/ablations --workers 2
    python -m examples.ablations report --out runs/ablations

A run that is done is not run again, and one that was interrupted goes on from its last
checkpoint. Ctrl-C saves and ends. README.md in this folder says what is compared and
what came out.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from examples.ablations import plan
from examples.ablations.plan import BY_NAME, FULL, QUICK, Run, Size
from mm1_mlx.cli.parser import Parser, did_you_mean, whole_number
from mm1_mlx.cli.progress import duration
from mm1_mlx.cli.run import INTERRUPTED, run_door
from mm1_mlx.errors import CheckpointError, UsageError

ALL = "all"


def parser() -> Parser:
    """The flags of these commands."""
    found = Parser(
        prog="python -m examples.ablations",
        description="MM1's ablations, repeated with models that train in minutes.",
    )
    commands = found.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, what: str) -> Parser:
        return commands.add_parser(name, help=what, description=what)

    shown = command("list", "every run, what it starts from, its minutes")
    _add_tables(shown, "*")
    run = command("run", "train and measure the runs of tables")
    _add_tables(run, "+")
    _add_out(run)
    run.add_argument(
        "--workers",
        type=whole_number(1),
        default=1,
        help="runs beside each other, a processor core each; default: %(default)s",
    )
    one = command("one", "one run by its name (`run` calls this)")
    one.add_argument("name", metavar="RUN", help="as `list` prints it")
    _add_out(one)
    report = command("report", "tables and plots of what is there")
    _add_out(report)
    report.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help="also put the tables between the marks of this file",
    )
    for each in (shown, run, one):
        _add_sizes(each)
    for each in (shown, run, one, report):
        each.add_debug()
    return found


def _add_tables(parser: Parser, number: str) -> None:
    names = f"of {', '.join(BY_NAME)}, or {ALL}"
    parser.add_argument("tables", nargs=number, metavar="TABLE", help=names)


def _add_out(parser: Parser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")


def _add_sizes(parser: Parser) -> None:
    parser.add_argument(
        "--seeds",
        type=whole_number(1),
        default=len(plan.SEEDS),
        help="runs of every cell; default: %(default)s",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny models and a few steps: a look at the machinery, no result",
    )


def _size(args: argparse.Namespace) -> Size:
    return QUICK if args.quick else FULL


def _runs(args: argparse.Namespace) -> list[Run]:
    """The runs of the tables that were named; UsageError for an unknown one."""
    names = args.tables or [ALL]
    for name in names:
        if name != ALL and name not in BY_NAME:
            known = [*BY_NAME, ALL]
            raise UsageError(
                f"unknown table '{name}'{did_you_mean(name, known)} (of "
                f"{', '.join(known)})"
            )
    chosen = plan.BY_VALUE if ALL in names else tuple(BY_NAME[name] for name in names)
    return plan.runs_of(chosen, tuple(range(args.seeds)))


def _list(args: argparse.Namespace) -> int:
    runs = _runs(args)
    for run in runs:
        needs = ", ".join(part.name for part in run.needs)
        print(f"{run.name:56} {run.cost:5.1f} min{f'  from {needs}' if needs else ''}")
    total = sum(run.cost for run in runs)
    joint = sum(run.kind == "joint" for run in runs)
    took = duration(60 * total)
    print(f"{len(runs)} runs, {joint} of them measured; {took} on one core")
    return 0


def _run(args: argparse.Namespace) -> int:
    from examples.ablations.pool import Pool
    from mm1_mlx.checkpoint.disk import locked
    from mm1_mlx.cli.training import StopOnSignal

    runs = _runs(args)
    args.out.mkdir(parents=True, exist_ok=True)
    with locked(args.out), StopOnSignal() as signals:
        pool = Pool(
            args.out,
            runs,
            _size(args),
            flags=["--seeds", str(args.seeds), *(["--quick"] if args.quick else [])],
            workers=args.workers,
            tell=_tell,
            stop=signals.asked,
        )
        if not pool.work():
            _tell("stopped and saved; the same command goes on from here")
            return INTERRUPTED
    _tell(f"all {len(runs)} runs are done; next: report --out {args.out}")
    return 0


def _one(args: argparse.Namespace) -> int:
    """One run; its lines are for `run`."""
    from examples.ablations.pool import DONE, summary
    from examples.ablations.work import do_run, result_of
    from mm1_mlx.cli.training import StopOnSignal

    seeds = tuple(range(args.seeds))
    known = {run.name: run for run in plan.runs_of(plan.TABLES, seeds)}
    if args.name not in known:
        raise UsageError(
            f"unknown run '{args.name}'{did_you_mean(args.name, known)}: `list` "
            f"prints all"
        )
    run, size = known[args.name], _size(args)
    found = result_of(args.out, run, size)
    with StopOnSignal() as signals:
        if found is None:
            found = do_run(args.out, run, size, progress=_share, stop=signals.asked)
    if found is None:
        return INTERRUPTED
    print(f"{DONE}1.0\n{run.name}: {summary(found)}", flush=True)
    return 0


def _share(share: float) -> None:
    from examples.ablations.pool import DONE

    print(f"{DONE}{share:.4f}", flush=True)


def _report(args: argparse.Namespace) -> int:
    from examples.ablations.report import write_report

    if not args.out.is_dir():
        raise CheckpointError(f"There is no folder {args.out}. `run` makes it.")
    for file in write_report(args.out, args.readme):
        print(file)
    if find_spec("matplotlib") is None:
        _tell("no plots: they need matplotlib, pip install 'mm1_mlx[train]'")
    return 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command's exit code."""
    commands = {"list": _list, "run": _run, "one": _one, "report": _report}
    return run_door(parser(), lambda args: commands[args.command](args), argv)


if __name__ == "__main__":
    sys.exit(main())
