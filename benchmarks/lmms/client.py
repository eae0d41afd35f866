"""``python -m lmms_eval``, with one of its errors mended, and SGLang's counts left behind.

    python benchmarks/lmms/client.py --model async_openai --tasks videomme ...

**Frames.** lmms-eval 0.7.3 sends wrong frames: it remembers encoded images by ``id(image)``, and an
id is given anew once its image is freed, so that a frame is sent as a copy of an earlier one (of
64 frames of a small video, 38 to 57 were right). Here no image is remembered.

**Counts.** Where SGLang's Engine lives in lmms-eval's own process, no ``/server_info`` could be
asked; what it would say is written to the file that ``PEVLM_SERVER_INFO`` names.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def send_every_frame() -> None:
    """Encode each image for itself."""
    from lmms_eval import protocol

    encode = protocol.encode_image_to_base64

    def encode_image_to_base64(image: Any, *, cache: Any = None, **options: Any) -> str:
        return str(encode(image, **options))

    protocol.encode_image_to_base64 = encode_image_to_base64


def leave_server_info(path: Path) -> None:
    """Write what the Engine counted, after each task."""
    from lmms_eval.models.chat.sglang import Sglang

    answer = Sglang.generate_until

    def generate_until(self: Any, requests: Any) -> Any:
        answers = answer(self, requests)
        path.write_text(json.dumps(self.client.get_server_info()))
        return answers

    Sglang.generate_until = generate_until


def main() -> None:
    from lmms_eval.__main__ import cli_evaluate

    send_every_frame()
    if "PEVLM_SERVER_INFO" in os.environ:
        leave_server_info(Path(os.environ["PEVLM_SERVER_INFO"]))
    cli_evaluate()


if __name__ == "__main__":  # SGLang's processes are spawned and import this file again
    main()
