"""A conversation in the terminal."""
import re
import sys

from common.pictures import open_image
from common.weights import UserError


def chat(answer, images):
    """Turns with history, as in Fig. 6. answer(rows, history): generate.answer, printing the words as they come"""
    turns, pictures = [], list(images)                    # pictures of all turns, the next one included
    for path in images:
        open_image(path)                                  # an unreadable one is reported before the first question
    sys.stdin.reconfigure(errors="replace")
    print("Ask. /image FILE shows a picture, /reset forgets everything, Ctrl-D leaves.")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        try:
            if line == "/reset":
                turns, pictures = [], []
            elif line.startswith("/image "):
                open_image(path := line.removeprefix("/image ").strip())
                pictures.append(path)
            elif re.fullmatch(r"/\w*", line):
                print("There is /image FILE and /reset.")
            elif line:
                (words, _, _), = answer([(line, pictures)], history=turns)
                turns.append((line, len(pictures) - sum(n for _, n, _ in turns), words))
        except UserError as error:
            print(f"{error} (/reset begins anew)")
        except KeyboardInterrupt:                         # stops this answer
            print()
