"""The official npm SDKs drive the API over the tests' fake engine.

python -m bench.npm_sdks FOLDER     where `npm install openai @anthropic-ai/sdk` was run
"""

import subprocess
import sys
from pathlib import Path


def main() -> None:
    from tests.serving import MODEL, serving
    from tests.test_server_sdk import reply

    script = Path(__file__).with_name("sdks.mjs")
    with serving(reply=reply) as (url, _):
        done = subprocess.run(["node", str(script), url, MODEL], cwd=sys.argv[1], check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
