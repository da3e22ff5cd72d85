"""``python -m dynaconv.data.worker``: tokenises what it is sent, until there is no more to read. See ``encoding.py``.

Pickles come in at the standard input, first the encoder, then batch after batch; each is answered at the standard
output with its tokens or with the error it caused.
"""

from __future__ import annotations

import os
import pickle
import sys

from dynaconv.errors import DynaconvError


def main() -> None:
    """Answers every batch; ends when the process that sends them closes the pipe or is gone, in the middle or not."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # what a library prints is no answer
    try:
        encoder = pickle.load(sys.stdin.buffer)
        while True:
            documents = pickle.load(sys.stdin.buffer)
            try:
                answer = encoder(documents)
            except DynaconvError as error:
                answer = error
            pickle.dump(answer, answers)
            answers.flush()
    except (EOFError, pickle.UnpicklingError, BrokenPipeError):
        os._exit(0)  # at once: there is nobody to flush to


if __name__ == "__main__":
    main()
