"""What stands behind the page: jobs, one worker, results. No gradio here; a page, an API and a command line are views of it.

    with Engine() as engine:                             # home: HASTEN_HOME, or the user's cache folder
        job = engine.submit({"kind": "generate", "model": "tiny-video", "prompt": "a seven moving left", "recipe": "balanced"})
        for snapshot in engine.follow(job.id):           # the newest one only; ends with the job
            print(snapshot.phase, snapshot.step, snapshot.steps, snapshot.skipped)
        done = engine.job(job.id)                        # done.state, done.result, done.error
        engine.outputs.file(done.result["output"], done.result["media"])

`limits`: what a request may ask for; `LimitError` says what, got, allowed and the next step. `request`: the kinds of request
(`generate`, `compare`, `text`, `decode`, `tune`, `train`, `download`), strict, without paths. `recipes`: recipes by name or YAML text.
`models`: models and LoRAs by id. `jobs`, `lease`: the queue in SQLite and who may work on it, shared by processes. `snapshot`:
where a job stands, and following it. `worker`: a thread for the bundled models, a spawned process for others. `cancel`:
stopping within one block of work. `work`: what each kind of job does. `preview`: pictures of latents. `latents`: what was denoised,
kept until its picture is whole. `standing`: where a job stands by its row. `outputs`: results by id,
and settings back from their files. `trouble`: failures in words, with remedies. `export`: requests as Python and YAML.

Every id that a page sends back (job, output, file, model, LoRA, preview) is looked up, never joined to a path.
"""

from __future__ import annotations

from hasten.ui.engine.engine import Engine
from hasten.ui.engine.jobs import ENDED, Job, State
from hasten.ui.engine.limits import Limits, RequestError
from hasten.ui.engine.request import (
    Compare,
    Decode,
    Download,
    Generate,
    Request,
    Text,
    Train,
    Tune,
    read,
    to_json,
)
from hasten.ui.engine.snapshot import Snapshot
from hasten.ui.engine.trouble import Remedy, Trouble

__all__ = [
    "ENDED", "Compare", "Decode", "Download", "Engine", "Generate", "Job", "Limits", "Remedy", "Request", "RequestError", "Snapshot", "State",
    "Text", "Train", "Trouble", "Tune", "read", "to_json",
]  # fmt: skip
