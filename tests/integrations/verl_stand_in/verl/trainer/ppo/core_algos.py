"""verl's registry of policy losses."""

POLICY_LOSS_REGISTRY = {}


def register_policy_loss(name):
    def register(function):
        POLICY_LOSS_REGISTRY[name] = function
        return function

    return register


def get_policy_loss_fn(name):
    if name not in POLICY_LOSS_REGISTRY:
        raise ValueError(f"Unsupported loss mode: {name}")
    return POLICY_LOSS_REGISTRY[name]
