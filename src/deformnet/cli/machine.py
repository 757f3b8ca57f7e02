"""The command that shows what can run on this machine."""


def doctor() -> None:
    """Print versions, the machine, and the backends that can run (and why the others cannot)."""
    from deformnet.engine.runs import machine, versions
    from deformnet.ops import backends
    from deformnet.ops.cpu import instruction_set

    for package, version in versions().items():
        print(f"{package:12} {version or 'not installed'}")
    print(f"{'machine':12} {machine()}")
    for backend in backends.names():
        reason = backends.why_unavailable(backend)
        state = "can run" if reason is None else f"cannot run: {reason}"
        if backend == "cpu" and reason is None:
            state += f" ({instruction_set()} instructions)"
        print(f"{backend:12} {state}")
