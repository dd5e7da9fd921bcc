from bench import run_as  # published commands call this script

run_as(__file__)
