"""What MkDocs asks of this repository: which pages there are, and how docstrings are read."""

import re
from pathlib import Path

from griffe import Extension
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "mcore_packing/__init__.py").read_text())[1]
# Each under its own path, so that links lead where they lead in the repository.
PAGES = "README.md", "docs/*", "examples/*.py", "CONTRIBUTING.md", "CHANGELOG.md"

# The names of several arguments, and their text down to the next line that is indented as little.
SEVERAL = r"^( +)(\*{0,2}\w+(?:, \*{0,2}\w+)+)(: .*(?:\n\1 +.*)*)"


def on_config(config):
    config.site_name = f"{config.site_name} {VERSION}"
    config.site_dir = str(ROOT / "out" / "docs" / VERSION)
    return config


def on_files(files, config):
    """The pages of the repository, and one of the reference for each group of names."""
    themes = [file for file in files if not Path(file.abs_src_path).is_relative_to(ROOT / "docs")]
    paths = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    pages = [
        File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path))
        for path in paths
    ]
    reference = []
    for title, names in config.extra["reference"].items():
        text = "\n\n".join([f"# {title}", *(f"::: {name}" for name in names)])
        file = f"reference/{title.lower().replace(' ', '-')}.md"
        reference.append(File.generated(config, file, content=text))
    first, *guides, contributing, changes = [
        page.src_uri for page in pages if page.src_uri.endswith(".md")
    ]
    config.nav = [first, {"Guides": guides}, {"Reference": [page.src_uri for page in reference]}]
    config.nav += [contributing, changes]
    return Files([*themes, *pages, *reference])


def describe_each(found: re.Match) -> str:
    indent, names, text = found.groups()
    return "\n".join(f"{indent}{name}{text}" for name in names.split(", "))


class AsWritten(Extension):
    """Reads docstrings as this house writes them."""

    def on_object(self, *, obj, **_):
        """An ``Example:`` is code; ``key, value: likewise`` describes each of the two."""
        if obj.docstring:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(SEVERAL, describe_each, text, flags=re.M)

    def on_function(self, *, func, **_):
        """``**old`` is there to say what an argument is called now."""
        for parameter in [each for each in func.parameters if str(each.annotation) == "NoReturn"]:
            del func.parameters[parameter.name]
