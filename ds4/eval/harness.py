"""ds4 as a model of lm-evaluation-harness, for MMLU, GPQA and all its other tasks.

Importing this registers it; `python -m ds4.eval` is the harness's command with it.
"""

import sys
from typing import Any

import ds4

from ..errors import BackendError, PromptError
from .likelihood import Scorer

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import (
        get_rolling_token_windows,
        make_disjoint_window,
        simple_parse_args_string,
    )
    from tqdm import tqdm
except ImportError as error:
    raise BackendError(
        f"tasks need lm-evaluation-harness, and {error.name} is missing: pip install 'ds4[eval]'"
    ) from error

Tokens = list[int]


@register_model("ds4")
class Ds4LM(TemplateLM):
    """Arguments, after --model_args: those of `ds4.load`, and `max_gen_toks`, the longest answer.

    The harness's own device and batch size are not asked: the one is a name of PyTorch's, and
    requests run one by one, in an order that reads a shared beginning once.
    """

    def __init__(
        self,
        model: str = "demo",
        backend: str = "auto",
        device: str = "auto",
        cache: Any = "native",
        context: int | None = None,
        max_gen_toks: int = 256,
    ) -> None:
        super().__init__()
        self.llm = ds4.load(model, backend, device, cache, context)
        if self.llm.tokenizer is None:
            raise PromptError(f"{model}: has no tokenizer.json, which tasks need")
        self.tokens, self.name = self.llm.tokenizer, model
        self.max_gen_toks = max_gen_toks
        self.scorer = Scorer(self.llm)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> "Ds4LM":
        return cls(**simple_parse_args_string(arg_string))

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: Any = None
    ) -> "Ds4LM":
        return cls(**arg_dict)

    @property
    def eot_token_id(self) -> int:
        return self.tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokens.bos_id

    @property
    def max_length(self) -> int:
        return self.llm.context

    @property
    def tokenizer_name(self) -> str:
        return f"ds4 {self.name}".replace("/", "--")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What distinguishes answers that were cached: the encoding has no template."""
        return "deepseek-v4" if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        assert self.llm.chat is not None  # comes with the tokenizer
        if not add_generation_prompt:
            raise PromptError("an answer that is begun for the model is not supported in chats")
        return self.llm.chat.render(chat_history)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> Tokens:
        """Control tokens that are spelled out count as such, as in the harness's own models."""
        return self.tokens.encode_with_specials(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
        before, after = super()._encode_pair(context, continuation)
        return self._begun(before), after

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for (text,) in tqdm([request.args for request in requests], disable=disable_tqdm):
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length - 1, 1
            )
            pairs = [("", *make_disjoint_window(window)) for window in windows]
            found = self._loglikelihood_tokens(pairs, disable_tqdm=True)
            totals.append(sum(total for total, _ in found))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, Tokens, Tokens]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (requests[i][1], requests[i][2]))
        for i in tqdm(order, disable=disable_tqdm, desc="continuations"):
            text, context, continuation = requests[i]
            found = self.scorer.score(context, continuation)
            answers[i] = found.log_probability, found.greedy
            if text:
                self.cache_hook.add_partial("loglikelihood", text, answers[i])
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        answers = []
        for context, asked in tqdm([request.args for request in requests], disable=disable_tqdm):
            options = self._options(dict(asked))
            room = self.max_length - 1 - options["max_tokens"]
            if room < 1:
                raise PromptError(
                    f"an answer of {options['max_tokens']} tokens leaves no room for a question in "
                    f"the context of {self.max_length}: say context= or max_gen_toks="
                )
            ids = self._begun(self.tok_encode(context)[-room:])
            answers.append(self.llm.generate(ids, **options).text)
            self.cache_hook.add_partial("generate_until", (context, asked), answers[-1])
        return answers

    def _begun(self, ids: Tokens) -> Tokens:
        """With a begin token, once."""
        return ids if ids[:1] == [self.tokens.bos_id] else [self.tokens.bos_id, *ids]

    def _options(self, asked: dict[str, Any]) -> dict[str, Any]:
        """SamplingParams' names for the harness's, which wants greedy text if it says nothing."""
        until = asked.get("until") or []
        sampled = asked.get("do_sample", asked.get("temperature", 0) > 0)
        names = "top_p", "top_k", "min_p", "repetition_penalty", "seed"
        return {
            "stop": (until,) if isinstance(until, str) else tuple(text for text in until if text),
            "max_tokens": int(asked.get("max_gen_toks", self.max_gen_toks)),
            "temperature": float(asked.get("temperature", 1.0)) if sampled else 0.0,
            **{name: asked[name] for name in names if name in asked},
        }


def main() -> None:
    """`lm_eval` with --model ds4 unless another is named."""
    if not {"--model", "-M", "ls", "validate"} & set(sys.argv):
        sys.argv[1:] = ["run", "--model", "ds4", *sys.argv[1:]]
    cli_evaluate()
