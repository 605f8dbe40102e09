"""The command line: parse, call one public function, print. Knows no models of its own."""
