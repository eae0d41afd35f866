"""lmms-eval itself against real servers on the CPU, by each route (``benchmarks/lmms``).

Not a part of continuous integration, whose environment has no lmms-eval: its pins do not go with
SGLang's. ``LMMS_EVAL_PYTHON`` names the interpreter of an environment that has it
(``benchmarks/lmms/README.md``); for the route ``engine`` it needs SGLang too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from accuracy.dataset import EXAMPLE, make_clip, write_questions
from lmms import routes
from lmms.table import METHODS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PYTHON = os.environ.get("LMMS_EVAL_PYTHON", sys.executable)
PIXELS = '{"video": {"min_pixels": 3136}, "image": {"min_pixels": 3136}}'

# Which frames of a video arrive, in order, as the images of an OpenAI message.
FRAMES = """
import base64, io, sys
import numpy as np
from PIL import Image
from qwen_vl_utils import fetch_video

sys.path.insert(0, sys.argv[1])
import client
from lmms_eval.protocol import ChatMessages

options = {"fps": 2, "min_pixels": 784, "max_pixels": 151200}
client.send_every_frame()
video = {"type": "video", "url": sys.argv[2]}
sent = ChatMessages(messages=[{"role": "user", "content": [video]}]).to_openai_messages(options)
urls = [part["image_url"]["url"] for part in sent[0]["content"]]
images = [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) for url in urls]
frames = fetch_video({"type": "video", "video": sys.argv[2], **options})
same = [
    (np.asarray(image) == frame.permute(1, 2, 0).numpy().astype(np.uint8)).all()
    for image, frame in zip(images, frames, strict=True)
]
print(len(same), sum(same))
"""


@cache
def has(*modules: str) -> bool:
    test = f"import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, {modules!r})))"
    return not subprocess.run([PYTHON, "-c", test]).returncode


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the local task's videos."""
    directory = tmp_path_factory.mktemp("lmms")
    clips = (make_clip(EXAMPLE, 32, number, each=1) for number in range(2))
    write_questions(clips, directory / ".cache" / "lmms" / "videos")
    return directory


@pytest.mark.skipif(not has("lmms_eval"), reason="needs lmms-eval: LMMS_EVAL_PYTHON")
def test_every_frame_is_sent(videos: Path) -> None:
    clip = next(videos.rglob("*.mp4"))
    done = subprocess.run(
        [PYTHON, "-c", FRAMES, str(BENCHMARKS / "lmms"), str(clip)], capture_output=True, text=True
    )
    assert done.stdout.split()[-2:] == ["64", "64"], done.stderr[-2000:]


@pytest.mark.server
@pytest.mark.parametrize("route", routes.ROUTES)
def test_table(route: str, videos: Path, tmp_path: Path) -> None:
    needed = ("lmms_eval", "sglang") if route == routes.IN_PROCESS else ("lmms_eval",)
    if not has(*needed):
        pytest.skip(f"needs {' and '.join(needed)}: LMMS_EVAL_PYTHON")
    command = [sys.executable, str(BENCHMARKS / "lmms" / "run.py"), "--cpu", "--route", route]
    command += ["--model", str(BENCHMARKS / "accuracy" / "model"), "--client", PYTHON]
    command += ["--benchmarks", "made_videos", "--cwd", str(videos), "--results", str(tmp_path)]
    command += ["--concurrency", "2", *(("--client-args", "fps=2") if route == "frames" else ())]
    done = subprocess.run(
        [*command, "--", "--mm-process-config", PIXELS], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    column = json.loads(done.stdout.splitlines()[-1])["columns"]["made, 32 s"]
    questions = (videos / ".cache/lmms/videos/questions.jsonl").read_text().splitlines()
    assert column["questions"] == len(questions)
    assert column["visible_fraction"] < 0.95
    if route != routes.FRAMES:  # the model was trained on video, not on images
        assert all(column[method] > 50 for method in METHODS)
