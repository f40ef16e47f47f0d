"""YAML in which plain words stay words, but for null, true and false, and no key stands twice."""

import re
from typing import Any

import yaml

NULL = re.compile(r"(?:~|null|Null|NULL|)$")
BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")


class _Loader(yaml.SafeLoader):
    """What yaml builds values with, of its safe types."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  of this class, not of its parent

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", NULL, ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", BOOL, list("tTfF"))


def load_yaml(text: str) -> Any:
    """
    Raises:
        ValueError: `text` is not YAML.
    """
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error
