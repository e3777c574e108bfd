"""Names in a list of a YAML file, added and removed in place: comments, order and layout of all the rest stay as a person wrote them."""

from typing import Any

import yaml

from puzzle_dag.config import ConfigError


def add_name(text: str, field: str, name: str, *, where: str) -> str:
    """Return YAML `text` with `name` at the end of its top-level list `field`; unchanged where it is there.

    Raises:
        ConfigError: `field` is no list, or the text is written so that it can't be edited safely. `where` names the file.
    """
    _, node = _find(text, field, where)
    items = node.value
    if name in [item.value for item in items]:
        return text
    if node.flow_style and items:
        place = items[-1].end_mark.index
        edited = f"{text[:place]}, {name}{text[place:]}"
    elif node.flow_style:
        place = node.start_mark.index + 1
        edited = f"{text[:place]}{name}{text[place:]}"
    else:
        place = _end_of_line(text, items[-1].end_mark.index)
        edited = f"{text[:place]}\n{' ' * node.start_mark.column}- {name}{text[place:]}"
    return _checked(text, edited, field, [*(item.value for item in items), name], where)


def remove_name(text: str, field: str, name: str, *, where: str) -> str:
    """Return YAML `text` without `name` in its top-level list `field`; unchanged where it isn't there. Raises ConfigError as `add_name`."""
    key, node = _find(text, field, where)
    items, names = node.value, [item.value for item in node.value]
    if name not in names:
        return text
    index = names.index(name)
    start, end = items[index].start_mark.index, items[index].end_mark.index
    if len(items) == 1 and not node.flow_style:
        edited = f"{text[: key.end_mark.index]}: []{text[end:]}"
    elif not node.flow_style:
        edited = text[: text.rfind("\n", 0, start) + 1] + text[_end_of_line(text, end) + 1 :]
    elif len(items) == 1:
        edited = f"{text[: node.start_mark.index]}[]{text[node.end_mark.index :]}"
    elif index + 1 < len(items):
        edited = text[:start] + text[items[index + 1].start_mark.index :]
    else:
        edited = text[: items[index - 1].end_mark.index] + text[end:]
    return _checked(text, edited, field, [n for n in names if n != name], where)


def _find(text: str, field: str, where: str) -> tuple[yaml.Node, yaml.SequenceNode]:
    document = yaml.compose(text, yaml.SafeLoader)
    if isinstance(document, yaml.MappingNode):
        for key, node in document.value:
            if key.value == field and isinstance(node, yaml.SequenceNode):
                return key, node
    raise ConfigError(f"{where}: field `{field}` must be a list; write `{field}: [a, b]`")


def _end_of_line(text: str, index: int) -> int:
    found = text.find("\n", index)
    return len(text) if found < 0 else found


def _checked(before: str, after: str, field: str, names: list[str], where: str) -> str:
    expected: dict[str, Any] = {**yaml.safe_load(before), field: names}
    try:
        found = yaml.safe_load(after)
    except yaml.YAMLError:
        found = None
    if found != expected:
        raise ConfigError(
            f"{where}: field `{field}` is written in a way that can't be edited here; make it `{field}: [{', '.join(names)}]`"
        )
    return after
