"""Rows of mutations.py: faults in rewards, which their tests must see."""

JUDGED, SERVE = "tests/commands/test_evaluate.py", "tests/rewards/test_serve.py"
SCORER = "tests/rewards/test_scorer.py"
MIXTURE, TRIAL = "tests/rewards/test_mixture.py", "tests/rewards/test_trial.py"
PUBLISHED, OCR = "tests/rewards/test_published_rewards.py", "tests/rewards/test_ocr.py"
REMOTE, JUDGE = (f"tests/rewards/test_remote{part}.py" for part in ("", "_settings"))

ROWS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "rewards/contract.py": (
        ("for row in metadata or [{}] * len(prompts)]", "for row in [{}] * len(prompts)]", TRIAL),
        ('getattr(function, "forward", function)', "function", TRIAL),
        ("(scores < limits[0]) | (scores > limits[1])", "scores < limits[0]", TRIAL),
    ),
    "rewards/trial.py": (
        ('if inner and told(reward, "image_only"):', "if False:", f"{TRIAL} -k image"),
        ("if column not in row]", "if not row]", TRIAL),
        ("if not scores.isfinite().all():", "if False:", TRIAL),
        ("if not gradient.isfinite().all():", "if False:", TRIAL),
        ("places = [0, 1 % len(prompts)]", "places = [0, 1]", TRIAL),
        ("check_health()  # a judge", "pass  # a judge", REMOTE),
    ),
    "learner/trial.py": (
        ("if whole or not registry.reads_weights(term.name):", "if True:", TRIAL),
        ("evaluation_prompts(config))", "[])", TRIAL),
    ),
    "rewards/mixture.py": (
        ("(own - own.mean()) / own.std()", "own - own.mean()", MIXTURE),
        ("if not is_flat(own):", "if True:", MIXTURE),
        ('if self.normalise != "prompt":', "if True:", MIXTURE),
        ("once = list(places.values())", "once = list(range(len(ids)))", MIXTURE),
        ("@ apart / (apart @ apart)", "@ apart / (each @ each.T).trace()", MIXTURE),
    ),
    "rewards/scorer.py": (
        ("(rewards, *parts.values())", "(rewards,)", f"{SCORER} -k shuffled"),
        ("at_once // pixels", "at_once", f"{SCORER} -k pixels"),
        ('getattr(self.decoder, "magnification", 1)', "1", f"{SCORER} -k pixels"),
    ),
    "rewards/clip.py": (
        ("partial(short_side, half=int)", "short_side", f"{PUBLISHED} -k pictures"),
        ('{"hidden_act": "gelu"', '{"hidden_act": "quick_gelu"', f"{PUBLISHED} -k authors_code"),
        ("!= end:", "== -1:", "tests/rewards/test_reward_weights.py -k read_off"),
    ),
    "rewards/clip_score.py": ((".clamp(min=0)", "", f"{PUBLISHED} -k slope"),),
    "rewards/pickscore.py": (("self.logit_scale.exp()", "self.logit_scale", f"{PUBLISHED} -k authors_code"),),
    "rewards/ocr.py": (
        ("(r'(?<![0-9A-Za-z])", "(r'", f"{OCR} -k asked"),
        ('if text is None or text == "":', "if True:", f"{OCR} -k asked"),
        ("min(self.distance(_plain(found), target), len(target))", "self.distance(_plain(found), target)", OCR),
        (".translate(SAME)", "", f"{OCR} -k edits"),
        (", use_cls=False)", ")", f"{OCR} -k line_by_line"),
        ("- slope_y.sum() / slope_x.sum() * boxes[..., 0]", "", f"{OCR} -k line_by_line"),
        ("cv2.setNumThreads(threads)", "pass", f"{OCR} -k threads"),
        ("intra_op_num_threads=threads, ", "", f"{OCR} -k threads"),
        ("image_only = True", "image_only = False", f"{OCR} -k refused_before"),
    ),
    "rewards/remote.py": (
        ("if status == 429 or status >= 500:", "if status >= 500:", REMOTE),
        ("if status == 429 or status >= 500:", "if status >= 400:", REMOTE),
        ('"allow_redirects": False', '"allow_redirects": True', REMOTE),
        ("session.trust_env = False", "session.trust_env = True", REMOTE),
        ("max(backoff, min(request.pauses[-judges:]))", "backoff", REMOTE),
        ("[(request.first + request.tries) %", "[request.first %", f"{REMOTE} -k spread"),
        ("or len(scores) != count:", "or len(scores) > count:", REMOTE),
        ("number and low <= score <= high", "number", REMOTE),
        ("if len(body) > MOST_BYTES:", "if False:", REMOTE),
        ("if time.monotonic() > end:", "if False:", REMOTE),
        ('words.replace(self._token, "[token]")', "words", JUDGE),
    ),
    "rewards/tokens.py": (('yield str(value.get("token_env", VARIABLE))', "yield VARIABLE", JUDGE),),
    "rewards/content.py": (
        ("yield from _modules(place) if inside else ()", "yield from ()", JUDGED),
        ("{_content(path)}\\0", "\\0", JUDGED),
    ),
    "rewards/serving.py": (
        ("same = hmac.compare_digest(", "same = bool(token) or hmac.compare_digest(", f"{SERVE} -k token"),
        ("if size > self.limits.body:", "if size > 9 * self.limits.body:", f"{SERVE} -k counted"),
        ("part.shape == chosen[0].shape and ", "", f"{SERVE} -m long -k thousand"),
        ("for row in sorted(request.scores)]", "for row in request.scores]", f"{SERVE} -k several_sizes"),
        (" if not part.request.answer.done()]", "]", f"{SERVE} -k given_up"),
        ("return [error] if len(parts) == 1 else", "return [error] * len(parts) if parts else", f"{SERVE} -k raises"),
        ("if self.merge else ()", "", f"{SERVE} -k merging"),
        ("if self._full else None", "if False else None", f"{SERVE} -k deadlines"),
        ("            if self._full:\n", "            if False:\n", f"{SERVE} -k memory_now"),
    ),
    "rewards/score_request.py": (
        (', formats=("PNG",)', "", f"{SERVE} -k wrong"),
        ("                _require_size(size, limits)\n", "", f"{SERVE} -k wrong"),
        (", parse_constant=_no_constant", "", f"{SERVE} -k wrong"),
    ),
    "commands/serve.py": (
        (".contiguous()", "", f"{SERVE} -k to_the_bit"),
        ("if token is None and not", "if False and not", "tests/commands/test_serve_reward.py -k lets_others"),
    ),
}
