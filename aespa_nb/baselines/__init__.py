"""Rival methods under one interface: `name(task: BlockTask, <options>) -> dict[str, Rounded]`."""
