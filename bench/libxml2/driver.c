/* SPDX-License-Identifier: Apache-2.0
 *
 * libxml2 made to parse a generated document: through SAX callbacks of ours, or into a
 * tree that XPath expressions then search. Usage: driver sax|xpath. Speaks the drivers'
 * protocol: "ready", then "NANOSECONDS RESULT" (CPU time) for each line of standard input.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <libxml/parser.h>
#include <libxml/xpath.h>

enum { N_RECORDS = 8000, N_SEARCHED = 2500 };

static char *document;
static int document_size;

static void make_document(int records) {
  size_t capacity = (size_t)records * 200 + 100;
  document = malloc(capacity);
  if (!document) exit(1);
  int n = sprintf(document, "<?xml version=\"1.0\"?><log>");
  for (int i = 0; i < records; i++)
    n += sprintf(document + n,
                 "<entry id=\"e%d\" level=\"%s\"><when>%d</when><text>part &lt;%d&gt; of &amp; "
                 "the \xc3\xa4rger</text><!-- %d --></entry>",
                 i, i % 7 ? "info" : "error", i * 37, i % 91, i);
  n += sprintf(document + n, "</log>");
  document_size = n;
}

typedef struct {
  long elements, attributes, bytes;
} Counts;

static void on_start(void *context, const xmlChar *name, const xmlChar **attributes) {
  Counts *counts = context;
  (void)name;
  counts->elements++;
  for (; attributes && *attributes; attributes += 2) counts->attributes++;
}

static void on_characters(void *context, const xmlChar *text, int size) {
  (void)text;
  ((Counts *)context)->bytes += size;
}

static long run_sax(void) {
  Counts counts = {0, 0, 0};
  xmlSAXHandler handler;
  memset(&handler, 0, sizeof handler);
  handler.startElement = on_start;
  handler.characters = on_characters;
  if (xmlSAXUserParseMemory(&handler, &counts, document, document_size)) exit(1);
  return counts.elements * 3 + counts.attributes * 5 + counts.bytes;
}

static double search(xmlXPathContextPtr context, const char *expression) {
  xmlXPathObjectPtr found = xmlXPathEvalExpression((const xmlChar *)expression, context);
  double value;
  if (!found) exit(1);
  value = found->floatval;
  xmlXPathFreeObject(found);
  return value;
}

static long run_xpath(void) {
  xmlDocPtr tree = xmlReadMemory(document, document_size, "made.xml", NULL, 0);
  xmlXPathContextPtr context = tree ? xmlXPathNewContext(tree) : NULL;
  double sum = 0;
  if (!context) exit(1);
  sum += search(context, "count(//entry[@level='error'])");
  sum += search(context, "sum(//when[. mod 3 = 0])");
  sum += search(context, "count(//entry[contains(text, '<9')]/@id)");
  xmlXPathFreeContext(context);
  xmlFreeDoc(tree);
  return (long)sum;
}

static long long cpu_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return (long long)now.tv_sec * 1000000000 + now.tv_nsec;
}

int main(int argc, char **argv) {
  char line[256];
  int is_sax = argc == 2 && !strcmp(argv[1], "sax");
  if (!is_sax && !(argc == 2 && !strcmp(argv[1], "xpath"))) {
    fprintf(stderr, "usage: %s sax|xpath\n", argv[0]);
    return 2;
  }
  make_document(is_sax ? N_RECORDS : N_SEARCHED);
  xmlInitParser();
  puts("ready");
  fflush(stdout);
  while (fgets(line, sizeof line, stdin)) {
    long long begin = cpu_ns();
    long result = 0;
    for (int i = 0; i < 8; i++) result += is_sax ? run_sax() : run_xpath();
    printf("%lld %ld\n", cpu_ns() - begin, result);
    fflush(stdout);
  }
  return 0;
}
