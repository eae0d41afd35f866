"""lmms-eval's command line, which leaves behind what SGLang's Engine counted in its process.

``run.py`` starts this in place of ``python -m lmms_eval`` where the Engine lives in lmms-eval's own
process and no ``/server_info`` could be asked. ``PEVLM_SERVER_INFO`` names the file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def main() -> None:
    from lmms_eval.__main__ import cli_evaluate
    from lmms_eval.models.chat.sglang import Sglang

    answer = Sglang.generate_until

    def generate_until(self: Any, requests: Any) -> Any:
        answers = answer(self, requests)
        Path(os.environ["PEVLM_SERVER_INFO"]).write_text(json.dumps(self.client.get_server_info()))
        return answers

    Sglang.generate_until = generate_until
    cli_evaluate()


if __name__ == "__main__":  # SGLang's processes are spawned and import this file again
    main()
