"""The commands of a chat: their names, and what they do. Plain text, for --help."""

# name: (arguments, what it does)
COMMANDS = {
    "image": (
        "PATH ...",
        "pictures for the next question; '/image -' takes them back; alone: lists them",
    ),
    "system": ("TEXT", "set the system prompt; '/system -' takes it away"),
    "clear": ("", "forget all turns and pictures"),
    "drop": ("[N]", "forget the oldest turn, or N of them"),
    "undo": ("", "take the last question and its answer back"),
    "retry": ("", "ask the last question again"),
    "draw": ("FILE", "draw the boxes of the last answer on its picture"),
    "save": ("FILE", "write the conversation: JSON, or Markdown to read (.md)"),
    "load": ("FILE", "go on with a conversation that was saved as JSON"),
    "stats": ("on|off", "statistics after each answer; alone: of the last one"),
    "help": ("", "this"),
    "exit": ("", "leave, as Ctrl-D does"),
}
ALIASES = {"quit": "exit", "bye": "exit", "images": "image", "?": "help"}


def table() -> str:
    """One line for each command."""
    lines = []
    for name, (arguments, what) in COMMANDS.items():
        lines.append(f"  {f'/{name} {arguments}'.rstrip():<17} {what}")
    return "\n".join(lines)
