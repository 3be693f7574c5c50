"""The schema checker llm-comply (pip install llm-comply) against a server.

python -m bench.comply                  the API over the tests' fake engine
python -m bench.comply URL MODEL        any server, such as one that `ds4 serve` runs
"""

import sys

from llm_comply.cli import main as comply

FORMATS = ("openai-chat", "anthropic", "open-responses")


def check(url: str, model: str) -> None:
    for form in FORMATS:
        comply(["--base-url", f"{url}/v1", "-k", "none", "-m", model, "--format", form])


def main() -> None:
    if len(sys.argv) == 3:
        check(sys.argv[1], sys.argv[2])
        return
    from tests.serving import MODEL, serving
    from tests.test_server_sdk import reply

    with serving(reply=reply) as (url, _):
        check(url, MODEL)


if __name__ == "__main__":
    main()
