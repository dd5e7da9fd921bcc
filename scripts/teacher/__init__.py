"""The parts of scripts/make_teacher_rows.py: jobs, the files of rows, the teachers."""
