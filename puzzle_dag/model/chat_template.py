"""The chat template of a checkpoint: how an OpenAI client's messages become the text that the model goes on with.

Children inherit the parent's. It is no part of what identifies a checkpoint (no tensor hangs on it), so that another
template trains nothing anew; it is brought to the children that there are.
"""

from pathlib import Path

from puzzle_dag.store import digest_file, write_atomically

CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""Where transformers keeps it; it goes before a template in tokenizer_config.json."""


def digest_chat_template(folder: Path) -> str | None:
    """Return the digest of a checkpoint's template file, or None where it has none."""
    path = folder / CHAT_TEMPLATE_FILE
    return digest_file(path) if path.is_file() else None


def inherit_chat_template(parent: Path, child: Path) -> None:
    """Give a child's folder the parent's template file, where the parent has one and the child's is another.

    Args:
        parent: folder of the parent's checkpoint.
        child: folder of the child's.
    """
    digest = digest_chat_template(parent)
    if digest is not None and digest != digest_chat_template(child):
        write_atomically(child / CHAT_TEMPLATE_FILE, (parent / CHAT_TEMPLATE_FILE).read_bytes())
