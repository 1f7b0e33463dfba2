"""From one machine to many: fills and runs the files in launch/, each of which makes machines, runs and cleans up.

(The workers of a sweep on machines that are there already are `tljax.launchers`, behind `--launch` of `tljax.sweep`.)
"""
