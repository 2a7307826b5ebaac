"""Rows of mutations.py that the GPU day's checks, and the tests of benchmarks, must see."""

GPU = "tests/benchmarks/test_gpu.py"
KERNELS, COLLECTIVES = f"{GPU} -k kernels", f"{GPU} -k collectives"
OUTCOMES, KILLED = f"{GPU} -m long -k whatever", f"{GPU} -m long -k killed"
STORE = "tests/cluster/test_waits.py -m long"
SCALE, FULL_SIZE = "tests/benchmarks/test_scale.py", "tests/benchmarks/test_full_size.py"
RACE, USUAL_DDPO = "tests/benchmarks/test_race.py", "tests/benchmarks/test_usual_ddpo.py"

ROWS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "diffusion/kernels.py": (
        ("sigma2 = eta**2 * (1 - after)", "sigma2 = eta * (1 - after)", KERNELS),
        ("[t].to(like.dtype).reshape", "[t].bfloat16().to(like.dtype).reshape", KERNELS),
        ("residual.square() / variance + variance.log()", "residual.square() / variance", KERNELS),
    ),
    "diffusion/flow_kernels.py": (
        ("g2 = a**2 * inside", "g2 = a * inside", KERNELS),
        ("(after.square() - eta**2 * posterior)", "(after.square() - posterior / 2)", KERNELS),
    ),
    "diffusion/rollout.py": (
        ("log_pf.append(kernel.log_pf(guided", "log_pf.append(kernel.log_pf(conditional", f"{GPU} -m long -k sampler"),
    ),
    "learner/process_group.py": (
        ("gradient.copy_(mean", "gradient.add_(mean", COLLECTIVES),
        ("    return parts\n", "    return parts[1:]\n", COLLECTIVES),
    ),
    "diffusion/gpu_memory.py": (("ascontiguousarray(array))", "ascontiguousarray(array[::-1]))", f"{GPU} -k copies"),),
    "benchmarks/gpu.py": (
        ('if entry["status"] not in AS_SAID:', "if False:", f"{GPU} -m long -k hangs"),
        ('entry["status"] in ("ok", "skipped")', 'entry["status"] != "failed"', f"{GPU} -k without_time"),
        ("            save()\n", "            pass\n", KILLED),
    ),
    "benchmarks/gpu_worker.py": (
        ("os._exit(0)", "return", KILLED),
        ("fine = bool(value <= limit)", "fine = not value > limit", OUTCOMES),
        ("    gpu_worker.main()", "    main()", OUTCOMES),
    ),
    "benchmarks/gpu_process.py": (("before, 0.05)", "before, 0.5)", f"{GPU} -m long -k given_back"),),
    "cluster/waits.py": (
        ("isinstance(cause, ObjectStoreFullError | OutOfDiskError)", "False", STORE),
        ("except (ObjectStoreFullError, OutOfDiskError) as", "except ZeroDivisionError as", STORE),
    ),
    "benchmarks/crowd.py": (
        ("(made.states == value).all() and ", "", SCALE),
        ("(made.model_output == value).all()", "True", SCALE),
        ("if not same or not np", "if not same and not np", SCALE),
        ("if not np.array_equal(parameter.grad", "if False and not np.array_equal(parameter.grad", SCALE),
        ("begun % lanes, begun + 1", "0, begun + 1", SCALE),
    ),
    "benchmarks/random_models.py": (
        ("like[0].numel() ** -0.5", "1.0", FULL_SIZE),
        ("dict(smaller[name] if tiny else {})", "smaller[name] | {'use_linear_projection': False}", FULL_SIZE),
    ),
    "benchmarks/full_size.py": (
        ("(_gb(plan), _gb(plan + bare))", "(_gb(plan), _gb(plan))", FULL_SIZE),
        ("role, max(most, alone + files), max(most_alone, alone)", "role, alone + files, alone", FULL_SIZE),
        ("if done.returncode:", "if done.returncode == 2:", FULL_SIZE),
    ),
    "benchmarks/race.py": (
        ("name = min(going", "name = max(going", f"{RACE} -k next"),
        ("or racer.seconds > LIMIT * wanted", "or racer.seconds < 0 * wanted", f"{RACE} -k limit"),
        ('self.add("single" if guidance == 1 else "guided", len(x))', 'self.add("guided", len(x))', f"{RACE} -k torch"),
        ("self.calls.on = False\n        self.epochs += 1", "self.epochs += 1", f"{RACE} -k beside_the_clock"),
    ),
    "benchmarks/race_shown.py": (
        ("share = (reward - before", "share = (after", f"{RACE} -k reached"),
        ('2 * spent["decode_train"]', 'spent["decode_train"]', f"{RACE} -k cost"),
        ("(theirs or curve[-1])", "(curve[-1])", f"{RACE} -k seed_by_seed"),
    ),
    "benchmarks/usual.py": (("(1 - after - variance)", "(1 - after)", USUAL_DDPO),),
    "benchmarks/usual_ddpo.py": (
        ("torch.maximum(-advantage", "torch.minimum(-advantage", USUAL_DDPO),
        ("rewards.std(correction=0)", "rewards.std()", USUAL_DDPO),
        ("self.weights[step].to(each) * each", "each", USUAL_DDPO),
        ("self.compared(rollouts).split(updates)", "map(self.compared, rollouts.split(updates))", USUAL_DDPO),
    ),
}
