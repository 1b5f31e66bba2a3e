# SPDX-License-Identifier: Apache-2.0
"""Where a video of an annotation file lies on this machine, and which questions are about the same one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from livevlm.benchmarks.schema import Problem, Query, Video

GENERIC = ("video",)  # names that every folder has one of: never looked for alone
SUFFIXES = ("", ".mp4", ".MP4", ".mkv", ".webm", ".avi", ".mov", ".npy")


@dataclass(frozen=True)
class Work:
    """A video that was found, with all questions about it in the order they are asked.

    Attributes:
        queries: by key; unique over all works of a run.
    """

    id: str
    path: Path
    queries: dict[str, Query]
    video: Video


def find(video: Video, roots: Sequence[Path], folders: Sequence[str]) -> Path | None:
    """The video's file or folder of frames, below one of the roots.

    The path that the annotation file names is shortened from the left until something is there: the folders it begins
    with are mostly those of the machine where the file was written.
    """
    for name in video.files:
        parts = [part for part in PurePosixPath(name).parts if part not in ("/", ".", "..")]
        least = 2 if PurePosixPath(name).stem in GENERIC and len(parts) > 1 else 1
        tails = [PurePosixPath(*parts[start:]) for start in range(len(parts) - least + 1)]
        for tail in tails:
            for root in roots:
                for folder in folders:
                    for suffix in SUFFIXES:
                        path = root / folder / f"{tail}{suffix}"
                        if _is_there(path, root):
                            return path
    return None


def _is_there(path: Path, root: Path) -> bool:
    try:
        return path.is_file() or (path.is_dir() and path != root)
    except (OSError, ValueError):  # no name of a file: too long, or with a zero in it
        return False


def gather(videos: Sequence[Video], roots: Sequence[Path], folders: Sequence[str]) -> tuple[list[Work], list[Problem]]:
    """Videos with their questions, each video once; and those that are missing, or are taken for each other."""
    works: dict[Path, Work] = {}
    missing: list[Problem] = []
    seen: set[str] = set()
    for video in videos:
        if not video.queries:
            continue
        path = find(video, roots, folders)
        if path is None:
            looked = ", ".join(map(str, roots))
            missing.append(Problem(video.where, f"video {video.files[0]} was not found below {looked}"))
            continue
        work = works.setdefault(path, Work(video.id, path, {}, video))
        if work.video.files[0] != video.files[0]:  # found by the end of its name alone
            other = f"which {work.video.where} calls {work.video.files[0]}"
            missing.append(Problem(video.where, f"video {video.files[0]} was found only as {path}, {other}"))
            continue
        for query in video.queries:
            for key in _keys(f"{video.id}/{query.key}"):
                if key not in seen:  # a benchmark may ask the same twice
                    seen.add(key)
                    work.queries[key] = query
                    break
    return list(works.values()), missing


def _keys(first: str) -> Iterator[str]:
    yield first
    number = 2
    while True:
        yield f"{first}#{number}"
        number += 1
