"""What the leading process of a run does alone: the manifest at its beginning, the summary at its end."""

from __future__ import annotations

from collections.abc import Callable

from serving.batch import manifest
from serving.batch.answering import MOST_PROBLEMS_LISTED, Tally, tell
from serving.batch.folder import InputFile
from serving.batch.job import Job, Part, part_stem
from serving.batch.manifest import SUMMARY, Entries
from serving.batch.parts import count_part, write_durable_json
from serving.batch.pieces import Survey
from serving.batch.processes import Claims
from stages.common.errors import UserError, listing
from stages.common.progress import progress


def lead(job: Job, claims: Claims, replace_changed: bool) -> Entries:
    """Hold the output folder for this run, and see to it that its manifest is that of the input as it is now.

    Raises:
        UserError: another run is at work, or the folder was begun with something else.
    """
    if not claims.take_run():
        raise UserError(
            f"{job.into}: another run is at work on it. Wait for it, or end it: what it has finished stays. More "
            "processes for one run: accelerate launch --num_processes N -m serving.predict …"
        )
    found = manifest.read_manifest(job.into)
    if found is None:
        return manifest.begin(job.into, job.run, job.files, look_with_progress(job))
    run, entries = found
    manifest.require_same_run(job.into, run, job.run)
    manifest.require_same_files(job.into, entries, job.files)
    changed = manifest.changed_files(entries, job.files)
    if changed:
        entries = replace(job, entries, changed, claims, replace_changed)
    copied = [file for file in job.files if not entries[file.name].looks_like(file)]
    for file in copied:
        # The same bytes, written again: not to be read once more by every run from now on.
        status = file.path.stat()
        entries[file.name] = entries[file.name]._replace(bytes=status.st_size, modified_ns=status.st_mtime_ns)
    if copied:
        manifest.write_manifest(job.into, job.run, entries)
    return entries


def look_with_progress(job: Job) -> Callable[[InputFile], Survey]:
    """`job.look` that says on stderr how far it is."""
    bar = progress(sum(file.path.stat().st_size for file in job.files), "looking through the input", "B")

    def look(file: InputFile) -> Survey:
        found = job.look(file)
        bar.update(file.path.stat().st_size)
        if file == job.files[-1]:
            bar.close()
        return found

    return look


def replace(job: Job, entries: Entries, changed: list[InputFile], claims: Claims, allowed: bool) -> Entries:
    """Take back the parts of files that have changed, and put what they are now into the manifest.

    Raises:
        UserError: that is not wanted, a file cannot be used, or another process is at work.
    """
    names = listing([file.name for file in changed])
    if not allowed:
        raise UserError(
            f"{job.into}: was begun when {names} held something else. Restore the input; or give --replace-changed, "
            f"and the parts of {len(changed):,} of {len(job.files):,} files are taken back and made again; or name "
            "another --output-folder."
        )
    renewed = entries | {file.name: manifest.surveyed(file, job.look) for file in changed}
    with claims.all_pieces() as alone:
        if not alone:
            raise UserError(
                f"{job.into}: processes of an earlier run are still at work on it. Wait for them or end them."
            )
        (job.into / SUMMARY).unlink(missing_ok=True)
        for file in changed:
            stem = part_stem(job.files.index(file))
            for path in (*job.into.glob(f"{stem}*"), *job.into.glob(f".{stem}*")):
                path.unlink()
        manifest.write_manifest(job.into, job.run, renewed)
    tell(f"made again since they have changed: the parts of {names}")
    return renewed


def conclude(job: Job, entries: Entries, parts: list[Part], damaged: dict[Part, str]) -> None:
    """Count what lies on the disk, and write the summary where it is all there.

    Raises:
        UserError: a file could not be read, or was written to meanwhile, or rows have no answer.
    """
    late = [file.name for file in job.files if not entries[file.name].looks_like(file)]
    if late:
        raise UserError(
            f"--folder: {listing(late)} was written to while the folder was answered, so parts may be of two kinds. "
            "Run again with --replace-changed when it is whole: its parts are made again."
        )
    if damaged:
        messages = list(damaged.values())
        more = "\n  …" if len(messages) > MOST_PROBLEMS_LISTED else ""
        raise UserError(
            f"{len(damaged):,} of {len(parts):,} parts could not be made; all others are in {job.into}:\n  "
            + "\n  ".join(messages[:MOST_PROBLEMS_LISTED])
            + more
            + "\nPut whole files in their place under the same names, then run again with --replace-changed."
        )
    tally = Tally()
    for part in parts:
        count_part(part.path, tally)
    counts = {"rows": tally.rows, "shortened": tally.shortened, "without_answer": tally.failed, "parts": len(parts)}
    write_durable_json(job.into / SUMMARY, counts)
    tell(f"{tally.summary()}, in {len(parts):,} parts in {job.into}")
    tally.require_answers(
        "All others are answered. Correct these rows in their files, then run again with --replace-changed."
    )
