"""The main job on a machine without a GPU: ask a real server about a video, with and without PEVLM.

    make demo

First, right answers: a small trained model answers questions about a video that is made on the
spot, the same under full attention and under PEVLM (``demo_answers.py``). Then, speed: a random
model of ten layers, whose answers mean nothing, prefills a prompt of 20,000 tokens under both
(``demo_speed.py``). One model cannot show both: the trained one knows videos of up to 56 seconds,
about 250 tokens, where attention takes no time that shows.

Sample output, on 2 cores that five other jobs were using too; a line of JSON follows:

    1. Right answers

    a video made on the spot: .cache/demo/40-10.mp4, 40 s, 80 sampled frames
    starting the server of the small trained model (about a minute) ...

    question                          right answer          full attention                 PEVLM
    Code?                             32                     32     0.10 s         32     0.10 s
    Place of triangle?                northeast       northeast     0.14 s  northeast     0.10 s
    Place before diamond?             northeast       northeast     0.09 s  northeast     0.11 s
    arrow or diamond first?           arrow               arrow     0.09 s      arrow     0.10 s
    Place of last ring?               southeast       southeast     0.10 s  southeast     0.08 s
    Colour ten seconds ago?           white               white     0.10 s      white     0.10 s

    all right, and the same; 186 tokens, 4 context blocks

    2. Speed

    starting the server of the ten-layer model ...
    run 1 of 3: full 32.52 s, PEVLM 15.01 s
    run 2 of 3: full 31.34 s, PEVLM 12.40 s
    run 3 of 3: full 36.07 s, PEVLM 16.05 s
    prompt: 20191 tokens, 17 context blocks

                     visible_fraction  time to first token
    full attention              1.000              32.52 s
    PEVLM                       0.163              15.01 s

    speed-up in time to first token: 2.17x
    largest difference of the answer's log-probs: 0.693
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import demo_answers
import demo_speed
import torch
from machine import card, summary

WORK_DIR = Path(__file__).resolve().parent.parent / ".cache" / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description="PEVLM beside full attention on a CPU server")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument(
        "--video",
        type=int,
        default=demo_answers.VIDEO,
        help=f"number of the example that is asked about (default: {demo_answers.VIDEO})",
    )
    parser.add_argument("--port", type=int, help="of the servers (default: free ones)")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=WORK_DIR,
        help="for model, videos and the servers' logs (default: .cache/demo)",
    )
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats: expected >= 1, got {options.repeats}")
    print(summary(card(torch.device("cpu"))), flush=True)
    print("\n1. Right answers\n")
    answers = demo_answers.run(options.work_dir, video=options.video, port=options.port)
    print("2. Speed\n")
    speed = demo_speed.run(options.work_dir, repeats=options.repeats, port=options.port)
    print(json.dumps({**answers, **speed}))


if __name__ == "__main__":
    main()
