"""Many subjects: a manifest, one attempt at one subject, and the engines that run attempts. No torch before training.

`subject.attempt` is the contract: idempotent, locked, resumable, and its exit code says whether to try again. An engine
(`local`, `on_ray`) only starts attempts and passes on what they report; `schedule` decides what runs next.
"""
