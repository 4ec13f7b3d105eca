"""mlxq inside a program: load on one thread, stream on another, cancel from a third.

python examples/embed_in_an_app.py MODEL "Your question"
"""

import sys
import threading

import mlxq


def main(path: str, question: str) -> None:
    model = mlxq.load(path, progress=lambda event: None)
    cancel = mlxq.CancelToken()

    def answer() -> None:
        for chunk in model.stream(question, max_tokens=200, temperature=0.7, seed=1, cancel=cancel):
            print(chunk.text, end="", flush=True)
            if chunk.result:
                print(f"\n[{chunk.result.finish_reason}, {chunk.result.generation_tokens} tokens]")

    worker = threading.Thread(target=answer)
    worker.start()
    try:
        worker.join(timeout=60)
    finally:
        cancel.cancel()
        worker.join()
        model.close()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2])
