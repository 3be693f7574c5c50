"""The official npm SDKs drive the API over the tests' fake engine.

python -m bench.npm_sdks FOLDER
"""

import argparse
import subprocess
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description="the npm SDKs over the fake engine")
    parser.add_argument("folder", help="where `npm install openai @anthropic-ai/sdk` was run")
    folder = parser.parse_args().folder

    from tests.serving import MODEL, serving
    from tests.test_server_sdk import reply

    script = Path(__file__).with_name("sdks.mjs")
    with serving(reply=reply) as (url, _):
        done = subprocess.run(["node", str(script), url, MODEL], cwd=folder, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
