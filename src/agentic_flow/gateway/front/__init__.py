"""The server's side of the vendors' formats: their requests in, their answers, streams and errors out."""
