"""Options that several commands have."""

import typer

PREDICTION = typer.Option(
    "--prediction-type", help="Prediction type of the base, epsilon or v_prediction, if its files lack it."
)
ZERO_SNR = typer.Option(help="Whether its noise schedule has zero terminal SNR, if its files lack it.")
COMPONENTS = typer.Option(
    help="Diffusers folder or hub id with the text encoders, VAE and noise schedule, if the base is the single file of "
    "a transformer."
)
PROGRESS = typer.Option(help="How progress is shown on the error output: auto, bars, lines, json or none.")
