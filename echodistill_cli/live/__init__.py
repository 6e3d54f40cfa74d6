"""The page of `echodistill live`: type a prompt, see the subject, and train a new one."""
