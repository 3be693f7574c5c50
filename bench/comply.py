"""The schema checker llm-comply (pip install llm-comply) against a server.

python -m bench.comply                  the API over the tests' fake engine
python -m bench.comply URL [MODEL]      any server, such as one that `ds4 serve` runs
"""

import argparse

from llm_comply.cli import main as comply

# With a name, for the checker leaves tests out by what it knows of models; any is taken here.
FORMATS = {"openai-chat": "gpt-5", "anthropic": "claude-opus", "open-responses": "gpt-5"}


def check(url: str, model: str | None = None) -> None:
    for form, name in FORMATS.items():
        comply(["--base-url", f"{url}/v1", "-k", "none", "-m", model or name, "--format", form])


def main() -> None:
    parser = argparse.ArgumentParser(description="llm-comply against a server")
    parser.add_argument("url", nargs="?", help="of a server; left out: the tests' fake engine")
    parser.add_argument("model", nargs="?", help="its name there")
    args = parser.parse_args()
    if args.url:
        check(args.url, args.model)
        return
    from tests.serving import serving
    from tests.test_server_sdk import reply

    with serving(reply=reply) as (url, _):
        check(url)


if __name__ == "__main__":
    main()
