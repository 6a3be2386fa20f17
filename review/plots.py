"""Let `dvc plots` draw without a network: `python -m review.plots`, once in a clone.

By default the page that `dvc plots show` and `dvc plots diff` write loads its drawing library from the network. This
puts the library into a page template and sets `plots.html_template` in .dvc/config.local: pages then need no network.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from stages.common.errors import UserError, run_stage
from stages.common.schema.base_model import PackageModel
from stages.common.sources.packages import fetch_package_member
from stages.common.tables import write_text

# Vega 5.33.0, Vega-Lite 5.23.0 and Vega-Embed 6.29.0 in one file: byte for byte what npm's packages of these versions
# have as build/*.min.js, without the lines that name their source maps. A wheel needs no Node, unlike npm.
LIBRARY = PackageModel(
    source="package",
    requirement="django-js-lib-vega-embed==6.29.0.3",
    distribution="wheel",
    sha256="995b3dcd5d8a4b4d1b87503515dd5a1a7ab6b309a0758f951c36fa8d2e06c582",
    member=["js_lib_vega_embed/static/js_lib_vega_embed/vega-embed-full.js"],
)
DVC_FOLDER = Path(".dvc")
# As DVC wants it: from .dvc.
TEMPLATE = Path("plots/page.html")
# DVC puts a <div> and a call of vegaEmbed for each plot where `{plot_divs}` stands. The policy forbids to load anything
# from anywhere; Vega compiles its expressions, hence 'unsafe-eval'.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:">
<title>DVC plots</title>
<style>
body { display: flex; flex-wrap: wrap; gap: 2em; margin: 2em; font-family: sans-serif; }
</style>
<script>
LIBRARY_CODE
</script>
<script>
const drawWithVega = vegaEmbed;
vegaEmbed = (place, specification) => {
  const element = document.querySelector(place);
  // A table without rows: DVC gives an empty specification.
  if (!specification.$schema) { element.remove(); return; }
  const actions = { export: true, source: false, compiled: false, editor: false };
  drawWithVega(element, specification, { renderer: "svg", actions }).catch((error) => { element.textContent = error; });
};
</script>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def page(library: str) -> str:
    """The page template with the library inside.

    Args:
        library: JavaScript that defines `vegaEmbed`.
    """
    # It would end the script in the middle, or be taken for one of DVC's placeholders.
    assert "</script" not in library.lower() and "{plot_divs}" not in library
    return PAGE.replace("LIBRARY_CODE", library)


def arguments() -> argparse.Namespace:
    """What the command line says: nothing."""
    parser = argparse.ArgumentParser(
        prog="python -m review.plots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    return parser.parse_args()


def main() -> None:
    """Write the template and tell DVC of it."""
    arguments()
    if not (DVC_FOLDER / "config").is_file():
        raise UserError("this is no DVC repository. Run this in the root of the pipeline's clone.")
    try:
        with fetch_package_member(LIBRARY) as path:
            library = path.read_text(encoding="utf-8")
    except UserError as error:
        raise UserError(f"the library that draws plots could not be fetched: {error}") from None
    write_text(DVC_FOLDER / TEMPLATE, page(library))
    dvc = Path(sys.executable).with_name("dvc")
    subprocess.run([dvc, "config", "--quiet", "--local", "plots.html_template", str(TEMPLATE)], check=True)
    print(f"plots: {DVC_FOLDER / TEMPLATE}; `dvc plots` now writes pages that need no network")


if __name__ == "__main__":
    run_stage(main)
