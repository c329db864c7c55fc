"""The site: nbs/ with their stored outputs, and the API reference. Built by `make docs`; nothing is executed."""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE / "_ext"), str(ROOT / "tools"), str(ROOT)]

from nbdev.config import get_config  # noqa: E402

cfg = get_config(path=ROOT)
project, author, release, copyright = cfg.title, cfg.author, cfg.version, cfg.copyright

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "nbdev_sphinx",
]
exclude_patterns = ["_build", "_ext", "**.ipynb_checkpoints"]

# notebooks
nb_render_markdown_format = "myst"  # tables in outputs
nb_execution_mode = "off"
nb_merge_streams = True
nb_mime_priority_overrides = [("html", "image/svg+xml", 5)]
nb_ipywidgets_js = {}
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "attrs_block"]
myst_dmath_double_inline = True
myst_heading_anchors = 3

# Math without a CDN: one file of the package sphinx-mathjax-offline, which draws SVG and so needs no fonts.
MATHJAX = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax/tex-svg-full.js"
mathjax_path = MATHJAX.name
mathjax3_config = {"options": {"enableMenu": False}, "svg": {"fontCache": "global"}}

# API reference
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
html_domain_indices = False

html_theme = "sphinx_book_theme"
html_title = cfg.title
html_baseurl = f"{cfg.doc_host}{cfg.doc_baseurl}/"
html_static_path = ["_static", str(MATHJAX)]
html_css_files = ["custom.css"]
html_favicon = "_static/favicon.svg"
html_js_files = ["access.js"]
html_sourcelink_suffix = ""  # so that the download button finds x.ipynb
html_show_search_summary = False  # summaries are fetched, which a page opened from a file may not do
html_context = {"default_mode": "auto"}
html_theme_options = {
    "repository_url": cfg.git_url,
    "repository_branch": cfg.branch,
    "path_to_docs": "",
    "repository_provider": "github",
    "launch_buttons": {"colab_url": "https://colab.research.google.com", "notebook_interface": "jupyterlab"},
    "use_repository_button": True,
    "use_download_button": True,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "navbar_start": [],
    "navbar_end": [],
    "navbar_persistent": [],
}
