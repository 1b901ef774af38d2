"""``python -m tools.study configs/studies/tiny.yaml``: run a study, or what is missing of it, and write its report."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

from miepo.errors import UserError
from tools.study import rows
from tools.study.report import write_report
from tools.study.study import execute, fingerprints, named, read_study, runs_of


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.study", description=__doc__)
    parser.add_argument("study", type=Path, help="a file in configs/studies")
    parser.add_argument("--out", type=Path, help="folder of the runs and the report; by default studies/NAME")
    parser.add_argument("--rows", type=Path, help="rows of finished runs; by default beside the study's file")
    parser.add_argument("--processes", type=int, help="runs at a time")
    parser.add_argument(
        "--accelerator", help="where runs compute, as trainer.accelerator; by default as the study says"
    )
    parser.add_argument("--dtype", help="the type they compute in, as policy.dtype; by default as the study says")
    parser.add_argument("--report", action="store_true", help="only write the report of what has finished")
    options = parser.parse_args(arguments)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    try:
        study = read_study(options.study)
        if options.processes is not None:
            if options.processes < 1:
                raise UserError(f"--processes must be at least 1, got {options.processes}")
            study = replace(study, processes=options.processes)
        machine = {"trainer.accelerator": options.accelerator, "model.policy.init_args.dtype": options.dtype}
        study = replace(study, machine={key: value for key, value in machine.items() if value is not None})
        if options.rows is not None:
            if not options.rows.parent.is_dir() or options.rows.is_dir():
                raise UserError(f"--rows: expected a file in a folder that is there, got '{options.rows}'")
            study = replace(study, rows=options.rows)
        if study.rows.resolve() == options.study.resolve():
            raise UserError(f"--rows: expected another file than the study's own, got '{study.rows}'")
        for path in filter(None, (study.prepare, study.true_front)):
            named(path)  # a slip in a name shows now and not after a night
        folder = (options.out or Path("studies") / study.name).resolve()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out: expected a folder, got '{folder}': {error.strerror}") from None
        if options.report:
            if not study.rows.is_file():
                raise UserError(f"--report: expected the rows of finished runs at '{study.rows}': there are none")
            found, notes = rows.read(study.rows, fingerprints(study, folder))
        else:
            found, notes = execute(study, folder)
        runs = runs_of(study, folder)
        page = write_report(study, found, [*notes, *rows.mixtures(found)], runs, folder)
    except KeyboardInterrupt:
        print("study: stopped; the same command goes on with what is missing", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"study: error: {error}", file=sys.stderr)
        return 2
    failed = [run.name for run in runs if run.failure and run.key not in found]
    print((folder / "summary.md").read_text())
    print(f"Report: {page}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
