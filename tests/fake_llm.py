"""A model that answers without computing, for tests of the command line.

Run as a script it is the `ds4` command with that model: python tests/fake_llm.py generate Hi
"""

import signal
import time
from types import SimpleNamespace

from ds4.errors import PromptError
from ds4.llm import Generation, Piece


class FakeLLM:
    """Writes `words`; told "forever" it goes on slowly, told "interrupt" it presses Ctrl-C.

    A prompt may have `context` characters. `requests` are the prompts and options it was given.
    """

    backend_name, device, chat = "fake", "cpu", "a chat encoding"
    unused = ()
    runner = SimpleNamespace(be=SimpleNamespace())  # a backend without placement
    tokenizer = SimpleNamespace(decode=lambda ids: f"<{ids[0]}>")

    def __init__(self, words="One two three.\n", context=1000):
        self.words, self.context = words, context
        self.requests = []

    def generate(self, prompt, **options):
        return [*self.stream(prompt, **options)][-1].generation

    def stream(self, prompt, **options):
        self.requests.append((prompt, options))
        if len(str(prompt)) > self.context:
            raise PromptError(f"the context of {self.context} is too short")
        return self._pieces(str(prompt[-1] if isinstance(prompt, list) else prompt))

    def _pieces(self, message):
        forever = "forever" in message
        tokens = []
        pieces = self.words.split(" ")
        while forever or len(tokens) < len(pieces):
            word = pieces[len(tokens) % len(pieces)]
            tokens.append(len(tokens) + 10)
            if "interrupt" in message and len(tokens) == 2:
                signal.raise_signal(signal.SIGINT)
            yield Piece(word if len(tokens) == 1 else " " + word, [tokens[-1]])
            time.sleep(0.01 if forever else 0)
        usage = {"prompt_tokens": 2, "completion_tokens": len(tokens)}
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        timings = {"prefill_tok_s": 20.0, "decode_tok_s": 10.0}
        logprob = SimpleNamespace(token=10, logprob=-0.5, top=((10, -0.5), (11, -1.5)))
        generation = Generation(self.words, tokens, "stop", usage, timings, [logprob])
        yield Piece("", [], "stop", generation)


if __name__ == "__main__":
    import ds4
    from ds4.cli import main

    ds4.load = lambda *args, **kwargs: FakeLLM()
    main()
