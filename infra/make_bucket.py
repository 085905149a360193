"""Make S3 buckets unless they are there: `python infra/make_bucket.py NAME …`, endpoint and credentials the AWS way."""

import sys

import boto3
from botocore.exceptions import ClientError


def main(names: list[str]) -> None:
    """Make the buckets."""
    client = boto3.client("s3")
    for name in names:
        try:
            client.head_bucket(Bucket=name)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
                raise
            client.create_bucket(Bucket=name)


if __name__ == "__main__":
    main(sys.argv[1:])
