"""A progress bar for a training run."""

from __future__ import annotations

from transformers import TrainerCallback


class ProgressBar(TrainerCallback):
    """A progress bar on standard error with the latest loss; nothing on standard output."""

    def __init__(self, enabled: bool = True):
        self.enabled = enabled

    def on_train_begin(self, args, state, control, **kwargs):
        if not (self.enabled and state.is_world_process_zero):
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._bar.start()
        self._task = self._bar.add_task(
            "", total=state.max_steps, completed=state.global_step, note=""
        )

    def on_step_end(self, args, state, control, **kwargs):
        if getattr(self, "_bar", None):
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if getattr(self, "_bar", None) and logs and "loss" in logs:
            note = f"loss {float(logs['loss']):.3f}"
            if "load_entropy" in logs:
                note += f"  load entropy {logs['load_entropy']:.2f}"
            self._bar.update(self._task, note=note)

    def stop(self) -> None:
        """Give the terminal its cursor back."""
        if getattr(self, "_bar", None):
            self._bar.stop()
