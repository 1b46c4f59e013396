"""Routes of the course: the steps of a learner's file, the lessons, and races against the reference."""

import dataclasses
from pathlib import Path
from typing import Annotated

import pydantic
from fastapi import APIRouter, Depends

from llm_basics.analysis import run_summary
from llm_basics.lab import catalog, service
from llm_basics.learn import lessons, overview, progress
from llm_basics.runs import run_dir

# options that differ between a run with user pieces and its reference
OWN = ("mine", "run_dir")

router = APIRouter(prefix="/api/learn", tags=["learn"])

Lab = Annotated[service.Lab, Depends(service.of)]


class Course(pydantic.BaseModel):
    """Progress of the file of `--mine`."""

    mine: str
    steps: list[overview.Step]
    next: str
    """The command to run next."""


class Page(pydantic.BaseModel):
    """The lesson of a step, with the requested hints."""

    name: str
    title: str
    pieces: list[str]
    optional: list[str]
    idea: str
    formula: str
    shapes: str
    paper: str
    later: dict[str, str]
    hints: list[str]


class Race(pydantic.BaseModel):
    """A run with user pieces, and the newest run with the same options and none."""

    yours: str
    reference: str | None


@router.get("")
def course(lab: Lab) -> Course:
    """The steps with their status and the last message of the check."""
    known = progress.Progress(lab.mine)
    return Course(mine=lab.mine, steps=overview.steps(known), next=overview.advice(known))


@router.get("/lessons/{step}")
def lesson(step: str, lab: Lab) -> Page:
    """The lesson of a step."""
    if step not in lessons.ORDER:
        raise catalog.Missing("there is no such step")
    found = dataclasses.asdict(lessons.load(step))
    hints = found["hints"][: progress.Progress(lab.mine).hints.get(step, 0)]
    return Page(**{name: found[name] for name in Page.model_fields} | {"hints": hints})


@router.get("/races")
def races(lab: Lab) -> list[Race]:
    """The runs with user pieces, newest first."""
    folders = lab.runs.folders()
    rows = sorted(folders, key=lambda id: lab.runs.summary(id, folders[id]).updated, reverse=True)
    own = [id for id in rows if _has_own_pieces(folders[id])]
    if not own:
        return []
    shared = {id: {k: v for k, v in run_summary.options(folders[id]).items() if k not in OWN} for id in rows}
    others = [id for id in rows if id not in own]
    return [
        Race(yours=id, reference=next((other for other in others if shared[other] == shared[id]), None))
        for id in own
    ]


def _has_own_pieces(folder: Path) -> bool:
    try:
        return bool(run_dir.read_recorded(folder).get(run_dir.ORIGINS))
    except (ValueError, OSError):
        return False
