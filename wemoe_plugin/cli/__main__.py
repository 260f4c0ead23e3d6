"""``python -m wemoe_plugin.cli``."""

from wemoe_plugin.cli import main

main()
