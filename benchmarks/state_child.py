"""Runs a command of arc-state and writes when each training step ended; for the interpreter that has arc-state.

python benchmarks/state_child.py times.json tx train data.kwargs.toml_config_path=...
"""

import json
import sys
import time
from pathlib import Path

STARTED = time.time()


def main() -> None:
    """Add a clock to Lightning's trainer, then hand over to arc-state's own command line."""
    import lightning.pytorch as pl  # type: ignore[import-not-found]
    from state.__main__ import main as state_main  # type: ignore[import-not-found]

    times: list[float] = []
    out = Path(sys.argv.pop(1))

    class Clock(pl.Callback):  # type: ignore[misc]
        """Notes when each step ended."""

        def on_train_batch_end(self, *_arguments: object) -> None:
            times.append(time.time() - STARTED)

    set_up = pl.Trainer.__init__

    def with_clock(self: object, *arguments: object, **options: object) -> None:
        callbacks = [*(options.pop("callbacks", None) or []), Clock()]  # type: ignore[misc]
        set_up(self, *arguments, callbacks=callbacks, **options)

    pl.Trainer.__init__ = with_clock
    try:
        state_main()
    finally:
        out.write_text(json.dumps(times))


if __name__ == "__main__":
    main()
