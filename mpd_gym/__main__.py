"""``python -m mpd_gym``: the command line."""

from mpd_gym.cli import main

if __name__ == "__main__":
    main()
