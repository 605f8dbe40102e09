"""The `fastvlm` command: each file parses one subcommand, calls one public function, prints."""
