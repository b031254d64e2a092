"""The shipped digits config, cut down to seconds."""

# A narrow network that learns enough in two epochs to have something to lose.
SMALL_DIGITS = (
    "model.arguments.width=4",
    "model.train.epochs=2",
    "data.calibration=64",
    "data.validation=100",
    "search.evaluations=6",
    "search.batch=3",
    "search.ppo.surrogate_steps=128",
    "search.ppo.surrogate_envs=8",
    "finish.epochs=1",
    "finish.candidates=2",
    "finish.rules=false",
    "device=cpu",
)
